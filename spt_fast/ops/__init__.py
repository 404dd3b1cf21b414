"""The operations, each with a plain PyTorch reference beside it (`<op>_reference.py`).

Notation, here and everywhere in the package:

    B    images of a batch
    N    tokens of an image, with its prefix tokens (class, registers)
    N_e  patch tokens of an image
    N_p  prompts of a layer
    D    width of a token; H heads of width d = D / H
    L    blocks of the model
    K    clusters
    M    rows (tokens) of a clustering problem
    G    clustering problems solved side by side ("groups", one per layer)
"""
