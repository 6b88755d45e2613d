/* crypto NAME: sha256 or aes-128-gcm by libcrypto, in the largest steps it is used with. */
#include <openssl/evp.h>
#include <string.h>

#include "work.h"

enum { kBlock = 64 << 10 };

static uint64_t first_word(const unsigned char* p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}

static void need(int ok, const char* what) {
  if (ok == 1) return;
  fprintf(stderr, "crypto: %s failed\n", what);
  exit(1);
}

int main(int argc, char** argv) {
  static unsigned char in[kBlock], out[kBlock + 16];
  const char* name = argc == 2 ? argv[1] : "";
  for (int i = 0; i < kBlock; i++) in[i] = (unsigned char)(i * 31 + 7);
  unsigned char digest[EVP_MAX_MD_SIZE];
  char more[32];
  if (strcmp(name, "sha256") == 0) {
    const int blocks = 4096; /* 256 MiB */
    EVP_MD_CTX* c = EVP_MD_CTX_new();
    need(EVP_DigestInit_ex(c, EVP_sha256(), NULL), "init");
    struct work w = work_begin(name);
    for (int i = 0; i < blocks; i++) need(EVP_DigestUpdate(c, in, kBlock), "update");
    need(EVP_DigestFinal_ex(c, digest, NULL), "final");
    snprintf(more, sizeof more, "bytes=%lld", (long long)blocks * kBlock);
    work_end(w);
    work_sum(w, first_word(digest), more);
    return 0;
  }
  if (strcmp(name, "aes-128-gcm") == 0) {
    const int blocks = 8192; /* 512 MiB */
    static const unsigned char key[16] = "0123456789abcdef", iv[12] = "fedcba98765";
    EVP_CIPHER_CTX* c = EVP_CIPHER_CTX_new();
    need(EVP_EncryptInit_ex(c, EVP_aes_128_gcm(), NULL, key, iv), "init");
    struct work w = work_begin(name);
    uint64_t sum = 0;
    for (int i = 0; i < blocks; i++) {
      int n;
      need(EVP_EncryptUpdate(c, out, &n, in, kBlock), "update");
      sum = work_mix(sum, first_word(out));
    }
    int n;
    need(EVP_EncryptFinal_ex(c, out, &n), "final");
    need(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_GET_TAG, 16, digest), "tag");
    snprintf(more, sizeof more, "bytes=%lld", (long long)blocks * kBlock);
    work_end(w);
    work_sum(w, work_mix(sum, first_word(digest)), more);
    return 0;
  }
  fprintf(stderr, "crypto: no workload '%s'\n", name);
  return 2;
}
