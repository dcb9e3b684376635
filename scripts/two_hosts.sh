#!/usr/bin/env bash
# Make two hosts on one machine, to test launches over a network: host1 (192.0.2.1) and host2 (192.0.2.2), each with
# its own network, process and host name namespaces and an sshd on port 2222; the network interface is eth0 in both.
# Files are shared, as on a cluster. Nothing outside of DIR is changed, and both hosts are removed with this script.
#   scripts/two_hosts.sh up DIR                 creates them, prints "ready", runs until it is stopped (Ctrl-C)
#   scripts/two_hosts.sh on DIR host1 COMMAND   runs a command on a host that is up
#   scripts/two_hosts.sh check                  exit code 0 if they can be created here, else 1 and the reason
#   scripts/two_hosts.sh install                installs the tools that `check` reports missing by apt-get (needs root)
# DIR/hostfile and DIR/deepspeed_env are for DeepSpeed's launcher; docs/launch.md shows a launch. Needs root for
# ip link set, mounts and sshd.
set -euo pipefail

_say() { echo "two_hosts: $*" >&2; }
_script="$(readlink -f "${BASH_SOURCE[0]}")"
PATH="$PATH:/usr/sbin:/sbin"
_spaces=(--net --pid --mount --uts --fork --kill-child)

_missing() {
    local tool
    for tool in ip sshd ssh ssh-keygen pdsh unshare nsenter setpriv; do
        command -v "$tool" >/dev/null || echo "$tool"
    done
}

check() {
    local missing
    missing="$(_missing | paste -sd ' ')"
    if [ "$(id -u)" != 0 ]; then
        _say "hosts cannot be created: only root can"
    elif [ -n "$missing" ]; then
        _say "hosts cannot be created: $missing not found; run scripts/two_hosts.sh install"
    elif ! unshare "${_spaces[@]}" ip link add eth0 type veth peer name eth1 2>/dev/null; then
        _say "hosts cannot be created: this machine allows no network namespaces (in a container: --privileged)"
    else
        return 0
    fi
    return 1
}

install() {
    [ -n "$(_missing)" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        _say "cannot install $(_missing | paste -sd ' '): needs root and apt-get"
        return 1
    fi
    _say "installing openssh-server, pdsh and iproute2"
    apt-get update -qq || true # old package lists may be enough
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        openssh-client openssh-server pdsh iproute2 util-linux >/dev/null
}

# Run as a host's first process. /proc is still the machine's here, so the number read is the machine's, too.
_host() {
    local dir="$1" name="$2" number
    exec 2>"$dir/$name.log"
    read -r number _ </proc/self/stat
    mount -t proc proc /proc
    hostname "$name"
    mount -t tmpfs tmpfs /run
    mkdir /run/sshd
    mount --bind "$dir/hosts" /etc/hosts
    mount --bind "$dir/ssh_config" /etc/ssh/ssh_config
    ip link set lo up
    "$(command -v sshd)" -D -e -f "$dir/sshd_config" &
    sleep infinity & # keeps the host up when everything else on it is killed
    echo "$number" >"$dir/$name.new"
    mv "$dir/$name.new" "$dir/$name.pid"
    wait
}

_files() {
    local dir="$1"
    ssh-keygen -q -t ed25519 -N "" -f "$dir/host_key"
    ssh-keygen -q -t ed25519 -N "" -f "$dir/user_key"
    printf '%s\n' "127.0.0.1 localhost" "192.0.2.1 host1" "192.0.2.2 host2" >"$dir/hosts"
    printf '%s\n' "host1 slots=1" "host2 slots=1" >"$dir/hostfile"
    # ssh notices a host that is cut off after 6 seconds, instead of a quarter of an hour.
    cat >"$dir/ssh_config" <<EOF
Host *
    Port 2222
    IdentityFile $dir/user_key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ConnectTimeout 5
    ServerAliveInterval 2
    ServerAliveCountMax 3
EOF
    cat >"$dir/sshd_config" <<EOF
Port 2222
HostKey $dir/host_key
AuthorizedKeysFile $dir/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
EOF
    # The launcher passes on little more than PYTHONPATH. PATH is for the compiler of DeepSpeed's ops.
    cat >"$dir/deepspeed_env" <<EOF
GLOO_SOCKET_IFNAME=eth0
NCCL_SOCKET_IFNAME=eth0
PATH=$PATH
EOF
    local name
    for name in DS_ACCELERATOR TORCH_EXTENSIONS_DIR OMP_NUM_THREADS; do
        [ -z "${!name:-}" ] || echo "$name=${!name}" >>"$dir/deepspeed_env"
    done
}

on() {
    local dir="$1" name="$2"
    shift 2
    if [ ! -f "$dir/$name.pid" ]; then
        _say "error: $name is not up in $dir"
        return 1
    fi
    exec nsenter --target "$(cat "$dir/$name.pid")" --net --pid --mount --uts --wd="$PWD" -- "$@"
}

_wait_for() {
    local what="$1" tries
    shift
    for tries in $(seq 100); do
        "$@" 2>/dev/null && return 0
        sleep 0.1
    done
    _say "error: $what is not there after $tries tries"
    return 1
}

_down() {
    trap - EXIT INT TERM
    local name
    for name in host1 host2; do
        # The end of its first process ends all others of the host and its network.
        [ ! -f "$_dir/$name.pid" ] || kill -KILL "$(cat "$_dir/$name.pid")" 2>/dev/null || true
    done
    wait
    rm -f "$_dir"/{host_key,user_key}{,.pub} "$_dir"/host?.pid
}

up() {
    check
    mkdir -p "$1"
    _dir="$(readlink -f "$1")"
    if [ -f "$_dir/host1.pid" ]; then
        _say "error: hosts are already up in $_dir, or were not ended properly: then remove the folder"
        return 1
    fi
    umask 077
    _files "$_dir"
    trap _down EXIT
    trap 'exit 143' INT TERM
    local name
    for name in host1 host2; do
        # The hosts end with this script even if it is killed.
        setpriv --pdeathsig KILL unshare "${_spaces[@]}" bash "$_script" _host "$_dir" "$name" 2>/dev/null &
    done
    _wait_for "$_dir/host1.pid" test -f "$_dir/host1.pid"
    _wait_for "$_dir/host2.pid" test -f "$_dir/host2.pid"
    nsenter --target "$(cat "$_dir/host1.pid")" --net \
        ip link add eth0 type veth peer name eth0 netns "$(cat "$_dir/host2.pid")"
    for name in host1 host2; do
        (on "$_dir" "$name" ip address add "192.0.2.${name#host}/24" dev eth0)
        (on "$_dir" "$name" ip link set eth0 up)
    done
    for name in host1 host2; do
        _wait_for "ssh to $name" bash "$_script" on "$_dir" host1 ssh "$name" true
    done
    echo "two_hosts: ready: $_dir/hostfile"
    wait
}

case "${1:-}" in
    up | on | check | install | _host) "$@" ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$_script"
        exit 2
        ;;
esac
