"""k-means for tokens: exact (`KMeans`) and in one pass (`StreamingKMeans`)."""

from spt_fast.clustering.estimator import Clustering
from spt_fast.clustering.kmeans import KMeans
from spt_fast.clustering.streaming import StreamingKMeans
from spt_fast.clustering.summary import Summary

__all__ = ["Clustering", "KMeans", "StreamingKMeans", "Summary"]
