#!/bin/bash
# aarch64 under qemu. First tests/native/qemu.sh: ring and numerics of the host transport. Then the aarch64 wheel: an
# aarch64 Python and its libraries from Debian's packages, an aarch64 PyTorch without CUDA (2.10.0) from the package
# index, in a folder of their own. No multiply-add of the library may be fused, both entry points must be found, and the
# demo on two CPU ranks must find every bit right.
#
#   tests/qemu.sh [WHEEL]                          dist/*_aarch64.whl by default; needs `make wheel` first
#
# Where there is no qemu-aarch64 (apt-get install qemu-user) or no apt-get it says so and is skipped. PY is a Python
# whose pip is to fetch, with the `test` extra. 300 MB to load, some ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0 here=$PWD
tests/native/qemu.sh || failed=1
wheel=${1-$(ls -t dist/*_aarch64.whl 2> /dev/null | head -1)}
[ -f "$wheel" ] || { echo "no aarch64 wheel in dist: run \`make wheel\`" >&2; exit 1; }
for tool in qemu-aarch64 apt-get dpkg; do
  command -v $tool > /dev/null || { echo "qemu: skipped: no $tool on this machine"; exit $failed; }
done
py=$(command -v "${PY:-.venv/bin/python}") wheel=$(realpath "$wheel") work=$(mktemp -d)
py=$(cd "$(dirname "$py")" && pwd)/$(basename "$py")
trap 'rm -rf "$work"' EXIT
cd "$work"

mkdir -p lists/partial cache/archives/partial
apt=(apt-get -qq -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o Dir::State::Lists="$work/lists"
  -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update
packages="libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libuuid1 libcrypt1
  libsqlite3-0 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
"${apt[@]}" download $(printf '%s:arm64 ' $packages)
for package in *.deb; do dpkg -x "$package" root; done
platforms=(--platform=manylinux_2_34_aarch64 --platform=manylinux_2_28_aarch64 --platform=manylinux_2_17_aarch64
  --platform=manylinux2014_aarch64)
PIP_CONSTRAINT=/dev/null "$py" -m pip --disable-pip-version-check install --quiet --no-deps --only-binary=:all: --target site \
  "${platforms[@]}" --python-version 3.11 torch==2.10.0 cuda-bindings==12.9.4 cuda-pathfinder filelock \
  typing-extensions sympy mpmath networkx jinja2 markupsafe fsspec "$wheel"
"$py" "$here/tests/unit/test_contraction.py" site/mnnvl_ar/_C.so || failed=1

# Ranks are started by the name that Python was started by: this script.
cat > python << END
#!/bin/sh
exec env PYTHONHOME=$work/root/usr PYTHONPATH=$work/site qemu-aarch64 -L $work/root -0 "\$0" $work/root/usr/bin/python3.11 "\$@"
END
chmod +x python
./python -c 'import platform, torch, mnnvl_ar
from importlib.metadata import entry_points
for group in "vllm.general_plugins", "sglang.srt.plugins":
    (entry,) = entry_points(group=group, name="mnnvl_ar")
    entry.load()()
print(f"qemu: {platform.machine()}, torch {torch.__version__}, mnnvl_ar {mnnvl_ar.__version__}:",
      f"{mnnvl_ar._library.ARCHITECTURES}, both entry points")'
./python -m mnnvl_ar demo --device cpu --ranks 2 --calls 8 --deadline 300
exit $failed
