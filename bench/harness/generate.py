"""Inputs of the workloads, the same bytes on every machine."""
import random


def text(size):
    """Text with the statistics of text: a vocabulary of Zipf's law, sentences, some numbers and repeated phrases."""
    r = random.Random(20120)
    letters = "etaoinshrdlcumwfgypbvk"
    vocabulary = ["".join(letters[min(int(r.expovariate(0.22)), len(letters) - 1)] for _ in range(r.randint(2, 10)))
                  for _ in range(20000)]
    phrases = []
    out, length = [], 0
    while length < size:
        if phrases and r.random() < 0.25:
            sentence = r.choice(phrases)
        else:
            words = [vocabulary[min(int(r.paretovariate(0.9)) - 1, len(vocabulary) - 1)] for _ in range(r.randint(4, 18))]
            if r.random() < 0.2:
                words.append(str(r.randint(1, 10 ** r.randint(1, 9))))
            sentence = " ".join(words).capitalize() + r.choice([". ", ".\n", ", ", "; "])
            if len(phrases) < 3000:
                phrases.append(sentence)
            elif r.random() < 0.05:
                phrases[r.randrange(len(phrases))] = sentence
        out.append(sentence)
        length += len(sentence)
    return "".join(out).encode()[:size]


_PRELUDE = """
typedef unsigned long size_t;
typedef unsigned int u32;
typedef unsigned long u64;
extern void *malloc(size_t); extern void free(void *); extern int printf(const char *, ...);
extern void *memcpy(void *, const void *, size_t); extern int strcmp(const char *, const char *);
struct node { struct node *left, *right, *parent; u64 key; int kind, level; char name[32]; };
struct vec { u64 *at; size_t count, room; };
"""


def _arithmetic(r, n):
    terms = ["a", "b", "i", "x", str(r.randint(1, 9999))]
    return " ".join("%s %s" % (r.choice(terms), r.choice("+-*^&|")) for _ in range(n)) + " " + r.choice(terms)


def _switch(r, name):
    cases = "".join("    case %d: x = (u64)(%s); if (x > %du) goto out; break;\n" % (c, _arithmetic(r, r.randint(2, 5)), r.randint(1, 99999))
                    for c in sorted(r.sample(range(200), r.randint(6, 24))))
    return """u64 %s(u64 a, u64 b, struct vec *v) {
  u64 x = a ^ b;
  for (u64 i = 0; i < v->count; i++) {
    switch (v->at[i] %% 200) {
%s    default: x += v->at[i] >> %d;
    }
  }
out:
  return x * %d;
}
""" % (name, cases, r.randint(1, 60), r.randint(3, 999))


def _tree(r, name):
    return """struct node *%(n)s(struct node *root, u64 key, const char *text) {
  struct node **at = &root, *up = 0;
  while (*at) {
    up = *at;
    if (up->level > %(a)d && up->kind == %(b)d) { struct node *t = up->left; up->left = up->right; up->right = t; up->level--; }
    int order = key < up->key ? -1 : key > up->key ? 1 : strcmp(text, up->name);
    if (order == 0) { up->kind += %(c)d; return root; }
    at = order < 0 ? &up->left : &up->right;
  }
  struct node *n = malloc(sizeof *n);
  if (!n) return root;
  n->left = n->right = 0; n->parent = up; n->key = key ^ %(d)d; n->kind = %(b)d; n->level = up ? up->level + 1 : 0;
  size_t i = 0;
  for (; i < sizeof n->name - 1 && text[i]; i++) n->name[i] = text[i] >= 'a' && text[i] <= 'z' ? text[i] - %(e)d : text[i];
  n->name[i] = 0;
  *at = n;
  return root;
}
""" % {"n": name, "a": r.randint(2, 90), "b": r.randint(0, 9), "c": r.randint(1, 5), "d": r.randint(1, 9999), "e": r.randint(1, 32)}


def _matrix(r, name):
    k = r.randint(3, 9)
    return """static double %(n)s_m[%(k)d][%(k)d];
double %(n)s(const double *in, double *out, int count) {
  double sum = 0;
  for (int i = 0; i < %(k)d; i++)
    for (int j = 0; j < %(k)d; j++) {
      double t = %(a)d.5;
      for (int q = 0; q < %(k)d; q++) t += %(n)s_m[i][q] * %(n)s_m[q][j] - in[(i * q + j) %% count];
      out[i * %(k)d + j] = t > %(b)d ? t / %(c)d.25 : -t;
      sum += out[i * %(k)d + j];
    }
  return sum;
}
""" % {"n": name, "k": k, "a": r.randint(0, 50), "b": r.randint(1, 99), "c": r.randint(1, 9)}


def _parser(r, name):
    words = ["".join(r.choice("abcdefghij") for _ in range(r.randint(3, 8))) for _ in range(r.randint(4, 10))]
    tests = "".join("    if (!strcmp(word, \"%s\")) { state = %d; total += %s; }\n" % (w, r.randint(0, 9), _arithmetic(r, 3))
                    for w in words)
    return """long %s(const char *s, u64 a, u64 b) {
  char word[64]; int state = 0; u64 total = 0, x = a + b, i = 0;
  while (*s) {
    size_t n = 0;
    while (*s == ' ' || *s == '\\t' || *s == '\\n') s++;
    while (*s && *s != ' ' && n < sizeof word - 1) word[n++] = *s++;
    word[n] = 0; i++;
%s    if (state == %d) x = x << %d | x >> %d;
    else if (word[0] >= '0' && word[0] <= '9') for (size_t k = 0; k < n; k++) x = x * 10 + (u64)(word[k] - '0');
  }
  return (long)(total ^ x);
}
""" % (name, tests, r.randint(0, 9), r.randint(1, 31), r.randint(1, 31))


def c_source(functions):
    """Preprocessed C: what a compiler meets, in proportion: branches, tables, pointers, loops, calls, floats."""
    r = random.Random(1972)
    makers = [_switch, _tree, _matrix, _parser]
    out = [_PRELUDE]
    for i in range(functions):
        out.append(r.choice(makers)(r, "f%d" % i))
    return "\n".join(out).encode()
