"""Pretrained decoders from Hugging Face folders, read without PyTorch.

`architecture` reads `config.json`, `tensors` the names and shapes that follow from it,
`weights` the `*.safetensors`. `models.decoder` computes with them.
"""
