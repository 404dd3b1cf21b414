"""The lines of README's first screen: tune the shipped backbone on the shipped digits, offline."""

import torch
from torch.utils.data import DataLoader, TensorDataset

import spt_fast
from spt_fast.data.shipped import load_backbone, load_digits
from spt_fast.training import evaluate, fit

torch.manual_seed(0)
train = DataLoader(TensorDataset(*load_digits("train")), batch_size=32, shuffle=True)  # 897 images
test = DataLoader(TensorDataset(*load_digits("test")), batch_size=100)
model = load_backbone()  # 6 blocks; or timm.create_model("vit_base_patch16_224.mae", pretrained=True)
protos = spt_fast.build_prototypes(model, train)  # 20 prompts for each block, from one pass
tuned = spt_fast.PromptedViT(model, protos, num_classes=10)  # frozen backbone; prompts and head learn
fit(tuned, train, epochs=5)
print(f"test accuracy {evaluate(tuned, test):.1%}")
tuned.save("digits.safetensors")
