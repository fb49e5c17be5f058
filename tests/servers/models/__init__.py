"""Models that a test writes itself: seeded weights of realistic scale, and the same model in fp32 to compare with.

architectures   config.json and the tensors of each architecture
tensors         safetensors files
weights, make   a model's folder; the process that writes it
reference       its forward, everything in fp32
"""
