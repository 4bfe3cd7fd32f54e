#!/bin/sh
# PID 1 of one machine: mounts the machine's root over the host's, then executes the host's systemd.
# usage: init.sh NAME DIR SHARED (DIR: the folder that the driver prepared for this machine)
set -eu
name=$1 dir=$2 shared=$3
mount --make-rprivate /
# From here on "$dir/root" is the machine's root. All mounts end with the mount namespace.
mount -t tmpfs udplb-vm "$dir/root"
cd "$dir/root"
mkdir upper work root
mount -t overlay udplb-vm -o lowerdir=/,upperdir=upper,workdir=work root
cd root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs tmpfs dev
mkdir dev/shm dev/pts
for node in null zero full random urandom tty; do
	touch "dev/$node"
	mount --bind "/dev/$node" "dev/$node"
done
touch dev/console
mount --bind "$CONSOLE" dev/console
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p tmp/shared usr/local/bin
mount --bind "$shared" tmp/shared
cp -a "$dir/booted-system" run/booted-system
cp -a run/booted-system/units run/units
cp -a run/booted-system/etc/. etc/
cp -a "$dir/stub" stub
ln -s /usr stub/coreutils
ln -sf /stub/udplb/bin/udplb usr/local/bin/udplb
hostname "$name"
# The driver moves the interfaces in, then closes standard input.
read -r _ || true
mkdir .old
pivot_root . .old
cd /
umount -l .old
exec env -i container=udplb-vm SYSTEMD_UNIT_PATH=/run/units \
	PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	/lib/systemd/systemd --system --log-target=console --show-status=false
