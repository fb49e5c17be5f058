#!/bin/bash
# One wheel under many PyTorches and Pythons, each installed from the package index into an environment of its own,
# deleted afterwards: far from the sources, both entry points must be found, and the demo on the CPU must find every bit
# right.
#
#   tests/versions.sh [TORCH VERSION...]           2.10.0 to 2.15.0 by default; needs `make wheel` first
#   PYTHONS="python3.10 python3.13" WHEEL=dist/a.whl tests/versions.sh 2.12.0
#
# The first PyTorch meets the first Python, the second the second, and so on round: all come up, but not every pair.
# One line a pair; exit status 1 if any failed or was not run. A PyTorch with CUDA is 3 GB to load and 7 GB on disk.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 2.10.0 2.11.0 2.12.0 2.13.0 2.14.0 2.15.0
pythons=()
for python in ${PYTHONS-python3.10 python3.11 python3.12 python3.13 python3.14}; do
  if "$python" -c '' 2> /dev/null; then pythons+=("$python"); else echo "$python: skipped: not on this machine"; fi
done
[ ${#pythons[@]} -gt 0 ] || { echo "no Python from 3.10 to 3.14; say PYTHONS=..." >&2; exit 1; }
wheel=${WHEEL-$(ls -t dist/*_"$(uname -m)".whl 2> /dev/null | head -1)}
[ -f "$wheel" ] || { echo "no wheel of this machine in dist: run \`make wheel\`, or say WHEEL=..." >&2; exit 1; }
wheel=$(realpath "$wheel")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

plugins='from importlib.metadata import entry_points
for group in "vllm.general_plugins", "sglang.srt.plugins":
    entry_points(group=group)["mnnvl_ar"].load()()'

check() { # check PYTHON TORCH: the last line says how it went; the rest is in $work/log
  local py=$work/venv/bin/python
  cd "$work" && "$1" -m venv venv &&
    PIP_CONSTRAINT=/dev/null "$py" -m pip --disable-pip-version-check install --quiet --no-cache-dir "torch==$2" numpy "$wheel" &&
    "$py" -c "$plugins" &&
    "$py" -m mnnvl_ar demo --device cpu --calls 20
}

say='import platform, torch; v = torch.version
print(f"torch {v.__version__} (CUDA {v.cuda}), Python {platform.python_version()}")'
for torch; do
  python=${pythons[0]}
  pythons=("${pythons[@]:1}" "$python")
  name="torch $torch, $python"
  if [ "$(df --output=avail -B1G "$work" | tail -1)" -lt 12 ]; then
    echo "$name: not run: less than 12 GB free"
    failed=1
    continue
  fi
  if (check "$python" "$torch") > "$work/log" 2>&1; then
    echo "$("$work/venv/bin/python" -c "$say" 2> /dev/null): loads, all bits right"
  else
    echo "$name: FAILED"
    tail -15 "$work/log" | sed 's/^/    /'
    failed=1
  fi
  rm -rf "$work/venv"
done
exit $failed
