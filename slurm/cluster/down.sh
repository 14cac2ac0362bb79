#!/usr/bin/env bash
# down.sh -d DIR: end the virtual cluster that up.sh made in DIR. Its logs stay in DIR/log, what jobs wrote in DIR/shared.
set -euo pipefail
[ "${1-}" = -d ] && [ -n "${2-}" ] || { echo "which cluster? down.sh -d DIR" >&2; exit 2; }
[ -d "$2" ] || exit 0
dir=$(readlink -f "$2")

# Process 1 of login; with it the kernel ends every process of every host, then the mounts and the networks.
login=$(cat "$dir/run/login.pid" 2>/dev/null || true)
if [ -n "$login" ] && grep --quiet --text "host.sh.$dir.login" "/proc/$login/cmdline" 2>/dev/null; then
    guests=() # programs run on login by vc exec are this machine's own processes
    for process in /proc/[0-9]*; do
        [ "$process/ns/net" -ef "/proc/$login/ns/net" ] && [ "${process#/proc/}" != "$login" ] && guests+=("${process#/proc/}")
    done
    kill -KILL "$login" "${guests[@]}" 2>/dev/null || true
    for ((i = 0; i < 500; i++)); do [ -e "/proc/$login" ] || break; sleep 0.02; done
    [ ! -e "/proc/$login" ] || { echo "down.sh: process $login does not end" >&2; exit 1; }
fi
rm -rf "${dir:?}"/{etc,run,state,spool}
