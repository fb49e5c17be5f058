#!/bin/bash
# One built mnnvl_ar/_C.so under many PyTorches and Pythons, each installed from PyPI into an environment of its own,
# deleted afterwards: it must load, and the demo on the CPU must find every bit right.
#
#   tests/versions.sh [TORCH VERSION...]           2.10.0 to 2.15.0 by default; needs `make build` first
#   PYTHONS="python3.10 python3.13" tests/versions.sh 2.12.0
#
# The first PyTorch meets the first Python, the second the second, and so on round: all come up, but not every pair.
# One line a pair; exit status 1 if any failed or was not run. A PyTorch with CUDA is 3 GB to load and 7 GB on disk.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 2.10.0 2.11.0 2.12.0 2.13.0 2.14.0 2.15.0
found=$(for v in 3.10 3.11 3.12 3.13; do "python$v" -c '' 2> /dev/null && echo "python$v"; done)
read -ra pythons <<< "${PYTHONS-${found//$'\n'/ }}"
[ ${#pythons[@]} -gt 0 ] || { echo "no Python from 3.10 to 3.13; say PYTHONS=..." >&2; exit 1; }
[ -f mnnvl_ar/_C.so ] || { echo "mnnvl_ar/_C.so has not been built; run \`make build\`" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

check() { # check PYTHON TORCH: the last line says how it went; the rest is in $work/log
  local py=$work/venv/bin/python tools="numpy pytest pytest-timeout hypothesis"
  "$1" -m venv "$work/venv" &&
    "$py" -m pip --disable-pip-version-check install --quiet --no-cache-dir "torch==$2" $tools &&
    "$py" -m pytest -q -p no:cacheprovider tests/unit/test_binary.py -k loads &&
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
  if check "$python" "$torch" > "$work/log" 2>&1; then
    echo "$("$work/venv/bin/python" -c "$say" 2> /dev/null): loads, all bits right"
  else
    echo "$name: FAILED"
    tail -15 "$work/log" | sed 's/^/    /'
    failed=1
  fi
  rm -rf "$work/venv"
done
exit $failed
