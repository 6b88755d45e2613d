#!/bin/sh
# static_test.sh RING3 STATIC_VMM: `ring3 with` refuses a static program, and says so of one that another program starts.
set -eu
ring3=$1
vmm=$2
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

if "$ring3" with -- "$vmm" > /dev/null 2> "$errors"; then echo "a static program was not refused"; exit 1; fi
grep -q 'linked statically' "$errors"

"$ring3" with -- sh -c '"$1"; exit $?' sh "$vmm" > /dev/null 2> "$errors"
[ "$(grep -c 'is linked statically' "$errors")" = 1 ] || { cat "$errors"; echo "no line, or more than one, about the static VMM"; exit 1; }
grep -qF "$vmm" "$errors"

# Spawned by Python, which uses posix_spawn or vfork.
"$ring3" with -- python3 -c 'import subprocess, sys; sys.exit(subprocess.run([sys.argv[1]], close_fds=False).returncode)' "$vmm" \
  > /dev/null 2> "$errors"
[ "$(grep -c 'is linked statically' "$errors")" = 1 ] || { cat "$errors"; echo "no line about a spawned static VMM"; exit 1; }

# Static, but no VMM; and what is not there.
if busybox=$(command -v busybox); then
  "$ring3" with -- sh -c '"$1" true; exit $?' sh "$busybox" 2> "$errors"
  [ ! -s "$errors" ] || { cat "$errors"; echo "a message about busybox"; exit 1; }
fi
"$ring3" with -- sh -c '/nonexistent/program; exit 0' 2> "$errors"
if grep -q ring3: "$errors"; then cat "$errors"; echo "a message about a program that is not there"; exit 1; fi
