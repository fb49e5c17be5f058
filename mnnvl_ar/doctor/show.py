"""What was found, as text for people."""

from __future__ import annotations

from typing import Any

from mnnvl_ar.doctor import matrix
from mnnvl_ar.doctor.selftest import ranks as ranks_text


def text(found: dict[str, Any]) -> str:
    several = sum(len(host["ranks"]) for host in found["hosts"]) > 1
    lines: list[str] = []
    for host in found["hosts"]:
        lines += [*_host(host, several), ""]
    came = f" ({ranks_text(found['missing'])} did not come)" if found["missing"] else ""
    lines += [*_outlook(found["outlook"], came), *_self_test(found), *map(_server, found["servers"])]
    lines += [f"PROBLEM: {line}" for line in found["problems"]] or ["No problem found."]
    return "\n".join(lines)


def _outlook(plan: dict[str, Any], came: str) -> list[str]:
    size = f"{plan['ranks']} rank{'s' if plan['ranks'] != 1 else ''}{came}"
    if plan["transport"] == "none":
        return [f"Outlook: no group of {size}: {plan['why']}."]
    return [
        f"Outlook: a group of {size} would get transport {plan['transport']}",
        f"  ({plan['why']}),",
        f'  and strategy "auto" would be {plan["strategy"]}.',
    ]


def _server(about: dict[str, Any]) -> str:
    name = {"vllm": "vLLM", "sglang": "SGLang"}[about["server"]]
    state = f"active, {about['replaces']}" if about["active"] else f"not active, {about['why_not']}"
    return f"{name} {about['version']}: {state}." if about["version"] else f"{name}: {state}."


def _self_test(found: dict[str, Any]) -> list[str]:
    test = found["self_test"]
    if not test["ran"]:
        return ["Self-test: left out (--seconds 0)."]
    if not test["ok"]:
        return ["Self-test: FAILED, see below."]
    small, large = (f"{test[name] / 1024:.0f} KiB" for name in ("row_bytes", "message_bytes"))
    lines = [
        f"Self-test: every bit right, {test['transport_reason']}.",
        f"  all_reduce took {test['latency_us']:.1f} us for {small}, and passed {test['bandwidth_gb_s']:.2f} GB/s for "
        f"{large} (message size over time; medians of rank 0).",
    ]
    lines += matrix.pairs(test.get("pairs", []), test["ranks"])
    if test["by_turns"]:
        lines.append("  Ranks share a GPU and run by turns, which is what was timed; no pair was measured by itself.")
    cpus = found["hosts"][0]["container"]["cpus"]
    if test["device"] == "cpu" and test["ranks"] > cpus:
        lines.append(f"  That is slow because {test['ranks']} ranks share {cpus} CPU{'s' if cpus > 1 else ''}.")
    return lines


def _host(host: dict[str, Any], several: bool) -> list[str]:
    torch, library, box = host["torch"], host["library"], host["container"]
    where = f" ({ranks_text(host['ranks'])})" if several else ""
    cuda = f"for CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    codes = ", ".join(library["architectures"]) or "none, so the host transport only"
    api = f", for CUDA {host['driver_api'] // 1000}.{host['driver_api'] % 1000 // 10}" if "driver_api" in host else ""
    marks = f"yes ({', '.join(box['marks'])})" if box["marks"] else "no sign of one"
    imex = ", ".join(host["imex"]["channels"]) if host["imex"]["channels"] else "no channel"
    refusal = host["multicast_refusal"]
    lines = [
        f"Host {host['host']}{where}: PyTorch {torch['version']} {cuda}, Python {torch['python']}",
        f"  GPU code   {codes} ({library['path']})",
        f"  driver     {host['driver'] or 'no kernel module visible'}{api}",
        f"  IMEX       {imex} (needed between hosts only)",
        f"  multicast  {f'switched off by {refusal}' if refusal else 'not switched off by any variable'}",
        f"  container  {marks}; {box['cpus']} CPUs, /dev/shm of {box['shm_bytes'] >> 20} MiB",
    ]
    lines += [f"  variable   {name}={value}" for name, value in host["environment"].items()]
    if host["gpus"]:
        lines += [_confidential(host), *(_gpu(gpu, several) for gpu in host["gpus"])]
    else:
        lines.append(f"  GPUs       none ({host['driver_error'] or 'the driver shows none to this process'})")
    if host["nvml_error"]:
        lines.append(f"  NVML       NVLinks, fabric and confidential computing unknown: {host['nvml_error']}")
    return lines + matrix.p2p(host)


def _confidential(host: dict[str, Any]) -> str:
    about = host["confidential_computing"]
    if about is None:
        return "  conf. computing: unknown"
    mode = f", multi-GPU mode: {about['multi_gpu']}" if about["on"] and about["multi_gpu"] else ""
    return f"  conf. computing: {'ON' if about['on'] else 'off'}{mode}"


def _gpu(gpu: dict[str, Any], several: bool) -> str:
    about = [f"capability {gpu['capability']}", f"{gpu['memory'] >> 30} GiB"]
    about.append("multicast" if gpu["multicast"] else "no multicast")
    about.append("fabric handles" if gpu["fabric_handles"] else "no fabric handles")
    about.append("NVLinks unknown" if gpu["nvlinks"] is None else f"{gpu['nvlinks']} NVLinks up")
    if gpu["fabric"]:
        fabric = gpu["fabric"]
        about.append(f"fabric {fabric['state']}" + (f" (NVML status {fabric['status']})" if fabric["status"] else ""))
    about += ["MIG, so no links to others"] if gpu["mig"] else []
    who = f" ({ranks_text(gpu['ranks'])})" if several and gpu["ranks"] else ""
    return f"  GPU {gpu['index']}{who}: {gpu['name']}, {', '.join(about)}"
