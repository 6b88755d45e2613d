#!/bin/sh
# usage: make_disk.sh FILES OUTPUT
# A disk that boots a Debian kernel from BIOS (SYSLINUX) and from UEFI (the shell's startup.nsh): a FAT file system
# without partitions. FILES is what tests/guest/prepare made.
set -eu
files=$1
out=$2
for tool in syslinux mformat mcopy; do
  command -v "$tool" > /dev/null || { echo "make_disk: $tool is not installed" >&2; exit 77; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
append='console=ttyS0 quiet ring3.test="echo from the disk; nproc"'
cat > "$work/syslinux.cfg" <<END
DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL vmlinuz
  INITRD initrd.gz
  APPEND $append
END
# One word: the UEFI shell hands quotes and carets on as it likes.
printf 'fs0:\r\n\\vmlinuz.efi initrd=\\initrd.gz console=ttyS0 quiet ring3.test=nproc\r\n' > "$work/startup.nsh"
truncate -s 64M "$work/disk"
mformat -i "$work/disk" -F -h 64 -s 32 ::
mcopy -i "$work/disk" "$files/vmlinuz-cloud" ::vmlinuz
mcopy -i "$work/disk" "$files/vmlinuz-cloud" ::vmlinuz.efi
mcopy -i "$work/disk" "$files/initramfs.gz" ::initrd.gz
mcopy -i "$work/disk" "$work/syslinux.cfg" ::syslinux.cfg
mcopy -i "$work/disk" "$work/startup.nsh" ::startup.nsh
syslinux --install "$work/disk"
mv "$work/disk" "$out"
