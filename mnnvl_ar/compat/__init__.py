"""This library in place of others: `compat.flashinfer` for FlashInfer's all-reduce fusion, `compat.servers` for what
vLLM and SGLang load. A front on the public API: it knows their names and habits, and nothing of kernels.

    servers                what the entry points of vLLM and SGLang do
    flashinfer             puts two functions in place of FlashInfer's, and takes them away again
    creation               create_allreduce_fusion_workspace: the vote, and what all ranks do if it fails
    calls                  allreduce_fusion: FlashInfer's arguments to our ops
    workspace, shared      what is handed out, and the one workspace of a group behind it
    policy, counted        what a fault does; how many calls were served
    patterns, settings     FlashInfer's codes; the environment
"""
