"""How far the answers of each mode are from the same model in fp32, given the text that they answered to.

python -m servers.against_fp32 MODEL_FOLDER SUBJECT WORK EVENTS
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from servers import answers
from servers.answers import Answer
from servers.compare import agreement, no_farther
from servers.events import Teller
from servers.models.reference import Reference
from servers.modes import MODES, OURS
from servers.prompts import Prompt


def distances(truth: Reference, asked: list[Prompt], found: list[Answer]) -> tuple[list[float], float]:
    """Of each answer, the mean distance of its tokens' log-probabilities from the truth's for the same text; and the
    share of tokens that are the truth's first choice."""
    means, first, places = [], 0, 0
    texts = [[*prompt, *answer.tokens[:-1]] for prompt, answer in zip(asked, found, strict=True)]
    for prompt, answer, right in zip(asked, found, truth.logprobs(texts), strict=True):
        chosen = torch.tensor(answer.tokens, device=right.device)
        right = right[len(prompt) - 1 :]
        own = torch.tensor([answer.logprob(place) for place in range(len(answer.tokens))], device=right.device)
        means.append(float((own - right.gather(1, chosen[:, None])[:, 0]).abs().mean()))
        first += int((right.argmax(-1) == chosen).sum())
        places += len(answer.tokens)
    return means, first / places


def compared(folder: Path, subject: str, outputs: Path, device: str) -> dict[str, Any]:
    """Of the modes whose answers are there. With those of ours and of as it is, also with each other."""
    files = {mode: outputs / f"{subject.replace('/', '.')}.{mode}.json.gz" for mode in (*MODES, "ops")}
    there = {mode: answers.load(file) for mode, file in files.items() if file.exists()}
    if not there:
        raise FileNotFoundError(f"no answers of {subject} in {outputs}: run its modes first")
    truth = Reference(folder, device)
    far = {mode: distances(truth, *each) for mode, each in there.items()}
    told: dict[str, Any] = {
        "to_fp32": {
            mode: {"logprob_apart_mean": statistics.fmean(means), "first_choice": share}
            for mode, (means, share) in far.items()
        }
    }
    ours = next((each for each in OURS if each in there), "")  # a subject has one of the two
    if ours:
        for mode in [each for each in there if each != ours]:
            told[f"ours_and_{mode}"] = agreement(there[ours][1], there[mode][1])
            told[f"no_farther_than_{mode}"] = no_farther(far[ours][0], far[mode][0])
    return told


if __name__ == "__main__":
    place = "cuda" if torch.cuda.is_available() else "cpu"
    asked, server, teller = sys.argv[2], sys.argv[2].split("/")[0], Teller(Path(sys.argv[4]))
    teller.tell("installed", version=answers.release(server), torch=torch.__version__)
    told = compared(Path(sys.argv[1]), asked, answers.folder(Path(sys.argv[3]), server), place)
    teller.tell("measured", kind="reference", **told)
