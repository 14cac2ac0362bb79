#!/usr/bin/env bash
# up.sh -d DIR [-n NODES] [-c CPUS] [-w PID]: a real Slurm cluster of virtual hosts on this machine.
#
#   slurm/cluster/up.sh -d /tmp/cluster -n 4         # one or two seconds
#   slurm/cluster/vc -d /tmp/cluster exec login bash # a shell where sbatch, srun, squeue... work
#   slurm/cluster/vc -d /tmp/cluster crash node2     # vc alone lists what else it does
#   slurm/cluster/down.sh -d /tmp/cluster
#
# The hosts are `login` (slurmctld, 10.77.0.1) and node1, node2... (slurmd, 10.77.0.11 and up), each in namespaces
# of its own, with its own munged, /run and /dev/shm; all other files are this machine's and therefore shared.
# Every process lives in login's PID namespace: ending that one process ends the cluster and leaves nothing behind.
# The machine's network and /etc stay as they are; all state is below DIR. Needs root, or else user namespaces.
# -c: CPUs a node claims to have (default 16). -w: go down when process PID has ended.
# Exit codes: 1 the cluster did not come up, 2 wrong arguments, 3 this machine can't have one.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
die() { echo "up.sh: $2" >&2; exit "$1"; }
unset "${!SLURM_@}" # of a real job that we may run in

dir='' nodes=4 cpus=16 watched=''
while getopts d:n:c:w: option; do
    case $option in
    d) dir=$OPTARG ;; n) nodes=$OPTARG ;; c) cpus=$OPTARG ;; w) watched=$OPTARG ;;
    *) exit 2 ;;
    esac
done
[ -n "$dir" ] || die 2 "say where the cluster's files go: up.sh -d DIR"
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd munged srun ip; do
    command -v $program >/dev/null ||
        die 3 "$program is missing: apt-get install -y --no-install-recommends slurm-wlm munge"
done
mkdir -p "$dir"
dir=$(readlink -f "$dir")
[ ${#dir} -lt 70 ] || die 2 "the path $dir has ${#dir} characters; sockets below it allow 69"
[ ! -e "$dir/run/login.pid" ] || die 2 "a cluster is up in $dir, or was until the power went: down.sh -d $dir"

new_host=(unshare --net --uts --ipc --pid --mount --fork --kill-child)
[ "$(id -u)" = 0 ] || new_host+=(--user --map-current-user --keep-caps)
"${new_host[@]}" true 2>"$dir/refused" || die 3 "namespaces are not allowed here: $(<"$dir/refused")"

rm -rf "${dir:?}"/{etc,run,state,spool,log,refused}
mkdir -p "$dir"/{etc,run,state,spool,log,shared}
sed "s|@DIR@|$dir|; s|@USER@|$(id -u)|; s|@NODES@|$nodes|; s|@LAST@|$((10 + nodes))|; s|@CPUS@|$cpus|g
    s|@JOB@|$((1 + RANDOM))|" \
    "$here/slurm.conf" >"$dir/etc/slurm.conf"
for i in 0 1 2 3; do ln -s /dev/null "$dir/etc/gpu$i"; done # slurmd counts only GPUs that are a device file
echo "Name=gpu File=$dir/etc/gpu[0-3]" >"$dir/etc/gres.conf"
echo "CgroupPlugin=cgroup/v1" >"$dir/etc/cgroup.conf" # said outright; the default looks for a mounted cgroup tree
(umask 077 && head -c 1024 /dev/urandom >"$dir/etc/munge.key")
{
    printf '127.0.0.1 localhost\n10.77.0.1 login\n'
    for ((i = 1; i <= nodes; i++)); do echo "10.77.0.$((10 + i)) node$i"; done
} >"$dir/etc/hosts"

setsid "${new_host[@]}" "$here/host.sh" "$dir" login </dev/null >"$dir/log/login.log" 2>&1 &
disown
if [ -n "$watched" ]; then
    # A process that ended has no exe any more, even if nobody has waited for it yet.
    # shellcheck disable=SC2016 # the inner shell expands these
    setsid bash -c 'while [ -e "/proc/$1/exe" ]; do sleep 0.5; done; "$2/down.sh" -d "$3"' \
        - "$watched" "$here" "$dir" \
        </dev/null >/dev/null 2>&1 &
    disown
fi
for ((i = 0; i < 500; i++)); do [ ! -e "$dir/run/login.pid" ] || break; sleep 0.02; done
vc() { "$here/vc" -d "$dir" "$@"; }
vc start-ctld || true
for ((i = 1; i <= nodes; i++)); do vc start "node$i" & done
wait
if ! vc wait-idle 30; then
    tail -n 5 "$dir"/log/* >&2
    "$here/down.sh" -d "$dir"
    die 1 "the cluster did not come up; logs are in $dir/log"
fi
echo "up: $nodes nodes in $dir"
