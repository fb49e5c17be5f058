"""Writes a model in a process of its own, which leaves nothing on the GPU: python -m servers.models.make ROOT MODEL

MODEL is JSON of the fields of `Model`.
"""

import json
import sys
from pathlib import Path

from servers.models.architectures import Model
from servers.models.weights import written

if __name__ == "__main__":
    print(written(Model(**json.loads(sys.argv[2])), Path(sys.argv[1])))
