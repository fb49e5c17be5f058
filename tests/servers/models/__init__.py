"""Models that a test writes itself: seeded weights of realistic scale, and the same model in fp32 to compare with.

architectures   config.json and the tensors of each architecture
tensors         safetensors files
weights         a model's folder
reference       its forward, everything in fp32
"""
