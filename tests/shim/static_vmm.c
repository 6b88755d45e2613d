/* Wants /dev/kvm and is linked statically: the preload cannot reach it. Ends with status 0 whether the device is there or not. */
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

int main(void) {
  const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  puts(kvm >= 0 ? "a KVM of the host's" : "no KVM");
  if (kvm >= 0) close(kvm);
  return 0;
}
