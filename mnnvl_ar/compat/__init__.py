"""This library in place of others: `compat.flashinfer` for FlashInfer's all-reduce fusion, `compat.servers` for what
vLLM and SGLang load. A front on the public API: it knows their names and habits, and nothing of kernels.

    servers                what the entry points of vLLM and SGLang do
    flashinfer             puts two functions in place of FlashInfer's, and takes them away again
    creation               create_allreduce_fusion_workspace: the vote, and what all ranks do if it fails
    calls                  allreduce_fusion: FlashInfer's arguments to our ops
    without_multicast      around FlashInfer's trtllm, while that makes its memory
    workspace, shared      what is handed out, and the one workspace of a group behind it
    fusion, group_calls    without FlashInfer: our op in a compiled graph, and which calls of a group are ours
    vllm_platform, vllm_classes, sglang_layer   the servers' own classes and layers, that call our ops
    policy, counted        what a fault does; how many calls were served
    patterns, settings     FlashInfer's codes; the environment
"""
