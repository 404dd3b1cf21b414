"""The lines of README's first screen: tune the shipped backbone on the shipped digits, offline."""

import torch
from torch.utils.data import DataLoader, TensorDataset

import spt_fast
from spt_fast.backbones.open import open_model
from spt_fast.data.shipped import load_digits
from spt_fast.training import evaluate, fit

torch.manual_seed(0)
train = DataLoader(TensorDataset(*load_digits("train")), batch_size=32, shuffle=True)  # 897 images
test = DataLoader(TensorDataset(*load_digits("test")), batch_size=100)
# No loss of MAE trains a class token: as in the paper's code, patches and prompts are averaged, then normed.
model = open_model("shipped", pool="avg-with-prompts")  # 6 blocks; or "vit_base_patch16_224.mae"
protos = spt_fast.build_prototypes(model, train)  # 20 prompts for each block, from one pass
tuned = spt_fast.PromptedViT(model, protos, num_classes=10)  # frozen backbone; prompts and head learn
fit(tuned, train, epochs=5)
print(f"test accuracy {evaluate(tuned, test):.1%}")
tuned.save("digits.safetensors")
