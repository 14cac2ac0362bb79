#!/usr/bin/env bash
# host.sh DIR HOST: process 1 of a virtual host, in new network, UTS, IPC, PID and mount namespaces (see up.sh).
# It gives the host its name, address, /run, /dev/shm, /etc/hosts, /etc/slurm and munged, and a node its slurmd;
# then it obeys the lines that vc writes to DIR/run/HOST.ask. When it dies, the kernel ends all that runs here.
set -euo pipefail
dir=$1 host=$2
read -r pid _ </proc/self/stat # our id as the machine counts: here it is 1
hostname "$host"
mount -t tmpfs tmpfs /run
mkdir /run/munge
mount -t tmpfs tmpfs /dev/shm
mount --bind "$dir/etc/hosts" /etc/hosts
mount --bind "$dir/etc" /etc/slurm
ip link set lo up

if [ "$host" = login ]; then
    ip link add bridge type bridge
    ip address add 10.77.0.1/24 dev bridge
    ip link set bridge up
else
    # One end of the cable is eth0 here, the other hangs on the bridge of login. The MAC address is a fixed one:
    # after a crash the other hosts still have it in their tables.
    number=${host#node}
    mac=$(printf 02:00:0a:4d:00:%02x $((10 + number)))
    on_login=(nsenter --net="/proc/$(<"$dir/run/login.pid")/ns/net" ip link)
    "${on_login[@]}" delete "$host" 2>/dev/null || true # a crashed node's, if the kernel has not come to it yet
    "${on_login[@]}" add "$host" up master bridge type veth peer name eth0 address "$mac" netns "/proc/$pid/ns/net"
    ip address add "10.77.0.$((10 + number))/24" dev eth0
    ip link set eth0 up
    mount -t proc proc /proc # slurmd follows the processes of a job by it
fi

# --force: munged warns, and does not refuse, if a folder above its key belongs to somebody else.
munged --force --key-file="$dir/etc/munge.key" --log-file="$dir/log/munged.$host.log" --seed-file=/run/munge/seed
[ "$host" = login ] || slurmd -N "$host" -b # -b: this node was booted, although the machine was not

rm -f "$dir/run/$host".{ask,answer}
mkfifo "$dir/run/$host".{ask,answer}
echo "$pid" >"$dir/run/$host.pid" # last: whoever reads it finds the host ready
while true; do
    read -r command <"$dir/run/$host.ask"
    code=0
    eval "$command" || code=$?
    echo "$code" >"$dir/run/$host.answer"
done
