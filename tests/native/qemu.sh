#!/bin/bash
# The host transport on aarch64, under qemu, without Python: programs of this folder by the cross compiler, with
# setup.py's flags. host_ring, with threads as ranks, must find every sum right; host_numerics must say what it says on
# this x86-64. Controls are builds in which they must find something: a ring that clears nothing, contracted
# multiply-adds, a floating-point mode that is left as it is. What qemu cannot show is the order of stores: here it is
# this machine's, which is stronger than aarch64's.
#
#   tests/native/qemu.sh                           a minute
#
# Where there is no qemu-aarch64 (apt-get install qemu-user) or no aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu) it says
# so and is skipped.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ "$(uname -m)" = x86_64 ] || { echo "qemu: skipped: tests/native: not an x86-64, to be compared with"; exit 0; }
for tool in g++ aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v $tool > /dev/null || { echo "qemu: skipped: tests/native: no $tool on this machine"; exit 0; }
done
flags=$(sed -n 's/^CXX_FLAGS = "\(.*\)"$/\1/p' setup.py)
[ -n "$flags" ] || { echo "qemu: no CXX_FLAGS in setup.py" >&2; exit 1; }
work=$(mktemp -d) failed=0
trap 'rm -rf "$work"' EXIT

build() { # build PROGRAM NAME [FLAG...]: for aarch64
  aarch64-linux-gnu-g++ -static $flags "${@:3}" "tests/native/$1.cpp" -pthread -o "$work/$2" || exit 1
}
wrong() {
  echo "qemu: tests/native: $*" >&2
  failed=1
}

build host_ring ring
for words in "1 200 1" "2 500 2" "3 500 3" "8 50 4"; do
  qemu-aarch64 "$work/ring" $words || wrong "host_ring $words: status $?"
done
build host_ring uncleared -DMNNVL_AR_TEST_BUILD
qemu-aarch64 "$work/uncleared" 2 100 1 2> "$work/said" && wrong "a ring that clears nothing passes"
sed 's/^/uncleared: /' "$work/said"
grep -q "a wrong sum" "$work/said" || wrong "a ring that clears nothing has no wrong sum"

g++ $flags tests/native/host_numerics.cpp -pthread -o "$work/here" || exit 1
"$work/here" > "$work/here.txt" || wrong "host_numerics on this machine: status $?"
build host_numerics there
qemu-aarch64 "$work/there" > "$work/there.txt" || wrong "host_numerics: status $?"
if diff "$work/here.txt" "$work/there.txt"; then
  echo "numerics: $(wc -l < "$work/there.txt") lines, all as on $(uname -m)"
else
  wrong "host_numerics: other bits than on $(uname -m)"
fi
build host_numerics contracted -ffp-contract=fast
qemu-aarch64 "$work/contracted" > "$work/contracted.txt" || wrong "host_numerics, contracted: status $?"
differ=$(diff "$work/here.txt" "$work/contracted.txt" | sed -n 's/^> \(.*[^ ]\) * [0-9]* words .*/\1/p' | paste -sd ';')
echo "contracted: other bits of ${differ:-none}"
[ -n "$differ" ] || wrong "contracted multiply-adds are not found"
build host_numerics unguarded -DMNNVL_AR_TEST_BUILD
qemu-aarch64 "$work/unguarded" 2> "$work/said" > "$work/unguarded.txt"
[ $? = 2 ] || wrong "a floating-point mode that is left as it is, is not found"
sed 's/^/unguarded: /' "$work/said"
exit $failed
