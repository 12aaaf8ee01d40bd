/* Tests of libvideomae_kernels.

     test_videomae_kernels tables ARCH...     every architecture has every kernel, and each cubin's own description of
   its parameters and threads is what the library packs; no GPU needed test_videomae_kernels emulated GOLDEN    launches
   and numbers on the fake libcuda.so.1 of fake_driver.c, and refusals test_videomae_kernels device GOLDEN      numbers
   on GPU 0; exit status 77, skipped, without one

   GOLDEN is the file of kernels/aot/golden.py, which also states how far each result may be from the float64 answer. */

#define _POSIX_C_SOURCE 200809L

#include "fake_driver.h"
#include "videomae_kernels.h"

#include <dlfcn.h>
#include <elf.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

#define CHECK(condition, ...)                               \
  do {                                                      \
    if (!(condition)) {                                     \
      failures++;                                           \
      printf("FAILED line %d, %s: ", __LINE__, #condition); \
      printf(__VA_ARGS__);                                  \
      printf("\n");                                         \
    }                                                       \
  } while (0)

#define REQUIRE_OK(call)                              \
  do {                                                \
    vmk_status status_ = (call);                      \
    CHECK(status_ == VMK_OK, "%s", vmk_last_error()); \
    if (status_ != VMK_OK) return;                    \
  } while (0)

static void refuses(vmk_status got, vmk_status wanted, const char *says) {
  CHECK(got == wanted, "wanted \"%s\", got \"%s\": %s", vmk_status_string(wanted), vmk_status_string(got),
        vmk_last_error());
  CHECK(strstr(vmk_last_error(), says), "\"%s\" is not in \"%s\"", says, vmk_last_error());
}

enum { EM_CUDA_MACHINE = 190, KPARAM_INFO = 0x17, PARAM_SIZE = 0x19, REQUIRED_THREADS = 0x10 };
enum { VALUE_IN_HEADER = 3, VALUE_SIZED = 4 };

static const Elf64_Shdr *section(const vmk_kernel *kernel, const char *name) {
  const Elf64_Ehdr *header = (const void *)kernel->cubin;
  const Elf64_Shdr *sections = (const void *)(kernel->cubin + header->e_shoff);
  const char *names = (const char *)kernel->cubin + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++)
    if (strcmp(names + sections[i].sh_name, name) == 0) return &sections[i];
  return NULL;
}

static int has_function(const vmk_kernel *kernel) {
  const Elf64_Shdr *symbols = section(kernel, ".symtab"), *strings = section(kernel, ".strtab");
  if (symbols == NULL || strings == NULL) return 0;
  const Elf64_Sym *symbol = (const void *)(kernel->cubin + symbols->sh_offset);
  for (size_t i = 0; i < symbols->sh_size / sizeof *symbol; i++) {
    const char *name = (const char *)kernel->cubin + strings->sh_offset + symbol[i].st_name;
    if (ELF64_ST_TYPE(symbol[i].st_info) == STT_FUNC && strcmp(name, kernel->symbol) == 0) return 1;
  }
  return 0;
}

static unsigned word(const unsigned char *at, int bytes) {
  unsigned value = 0;
  for (int i = 0; i < bytes; i++) value |= (unsigned)at[i] << 8 * i;
  return value;
}

/* One EIATTR_KPARAM_INFO: index, ordinal, offset, and the size above 18 bits of other things. */
static void check_parameter(const vmk_kernel *kernel, const unsigned char *at) {
  unsigned ordinal = word(at + 4, 2), offset, size;
  vmk_status status = vmk_layout(kernel, ordinal, &offset, &size);
  CHECK(status == VMK_OK, "sm_%d %s, parameter %u: %s", kernel->capability, kernel->name, ordinal, vmk_last_error());
  if (status != VMK_OK) return;
  CHECK(offset == word(at + 6, 2) && size == word(at + 8, 4) >> 18,
        "sm_%d %s, parameter %u: the library has %u bytes at %u, the cubin %u at %u", kernel->capability, kernel->name,
        ordinal, size, offset, word(at + 8, 4) >> 18, word(at + 6, 2));
}

static void check_parameters(const vmk_kernel *kernel) {
  char name[128];
  unsigned count = 0, total = kernel->num_arguments + kernel->trailing_pointers, offset = 0, size = 0;
  unsigned end = 0, threads = 0, seen = 0;
  snprintf(name, sizeof name, ".nv.info.%s", kernel->symbol);
  const Elf64_Shdr *info = section(kernel, name);
  CHECK(info, "sm_%d %s has no section %s", kernel->capability, kernel->name, name);
  if (info == NULL) return;
  const unsigned char *at = kernel->cubin + info->sh_offset, *stop = at + info->sh_size;
  while (at + 4 <= stop) {
    unsigned kind = at[1], bytes = at[0] == VALUE_SIZED ? word(at + 2, 2) : 0;
    if (kind == KPARAM_INFO && bytes == 12) {
      check_parameter(kernel, at + 4);
      seen |= 1u << word(at + 8, 2);
      count++;
    }
    if (kind == PARAM_SIZE && at[0] == VALUE_IN_HEADER) end = word(at + 2, 2);
    if (kind == REQUIRED_THREADS && bytes == 12) threads = word(at + 4, 4) * word(at + 8, 4) * word(at + 12, 4);
    at += 4 + bytes;
  }
  vmk_layout(kernel, total - 1, &offset, &size);
  CHECK(count == total && seen == (1u << total) - 1, "sm_%d %s has %u parameters, the library packs %u",
        kernel->capability, kernel->name, count, total);
  CHECK(end == offset + size, "sm_%d %s takes %u bytes, the library packs %u", kernel->capability, kernel->name, end,
        offset + size);
  CHECK(threads == kernel->threads, "sm_%d %s is for %u threads, the table says %u", kernel->capability, kernel->name,
        threads, kernel->threads);
}

static void check_cubin(const vmk_kernel *kernel) {
  const Elf64_Ehdr *header = (const void *)kernel->cubin;
  int is_elf = kernel->cubin_bytes > sizeof *header && memcmp(header->e_ident, ELFMAG, SELFMAG) == 0 &&
               header->e_machine == EM_CUDA_MACHINE &&
               header->e_shoff + (size_t)header->e_shnum * sizeof(Elf64_Shdr) <= kernel->cubin_bytes;
  CHECK(is_elf, "sm_%d %s is no whole CUDA ELF", kernel->capability, kernel->name);
  if (!is_elf) return;
  /* from ABI version 8 on the capability lies in the second byte */
  int capability = header->e_ident[EI_ABIVERSION] >= 8 ? header->e_flags >> 8 & 0xff : header->e_flags & 0xff;
  CHECK(capability == kernel->capability, "%s is for sm_%d, the table says sm_%d", kernel->name, capability,
        kernel->capability);
  CHECK(has_function(kernel), "sm_%d %s has no function %s", kernel->capability, kernel->name, kernel->symbol);
  check_parameters(kernel);
}

static void test_tables(int count, char **architectures) {
  CHECK(vmk_num_kernels() == (size_t)count * VMK_NUM_ROLES, "%zu kernels for %d architectures", vmk_num_kernels(),
        count);
  CHECK(vmk_kernel_at(vmk_num_kernels()) == NULL, "the table has an end");
  for (int a = 0; a < count; a++)
    for (int role = 0; role < VMK_NUM_ROLES; role++) {
      int found = 0;
      for (size_t i = 0; i < vmk_num_kernels(); i++)
        found += vmk_kernel_at(i)->capability == atoi(architectures[a]) && (int)vmk_kernel_at(i)->role == role;
      CHECK(found == 1, "sm_%s has %d kernels for role %d", architectures[a], found, role);
    }
  for (size_t i = 0; i < vmk_num_kernels(); i++) check_cubin(vmk_kernel_at(i));
}

static void test_refusals_without_gpu(void) {
  vmk_context *gpu = NULL;
  unsigned offset, size;
  const vmk_kernel *kernel = vmk_kernel_at(0);
  refuses(vmk_open(0, NULL), VMK_INVALID, "context must not be null");
  refuses(vmk_open(-2, &gpu), VMK_INVALID, "device must be");
  refuses(vmk_layout(NULL, 0, &offset, &size), VMK_INVALID, "must not be null");
  refuses(vmk_layout(kernel, kernel->num_arguments + kernel->trailing_pointers, &offset, &size), VMK_INVALID,
          "no argument");
  CHECK(vmk_fold_bytes(0) == 0 && vmk_fold_bytes(17) == 0 && vmk_fold_bytes(1 << 24) == 0, "D that is refused");
  CHECK(vmk_fold_bytes(768) == 768 * (1536 * 2 + 4) + 6 * 4, "weight, bias and constants; got %zu",
        vmk_fold_bytes(768));
  vmk_close(NULL);
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == NULL) {
    refuses(vmk_open(0, &gpu), VMK_NO_DRIVER, "libcuda.so.1");
    CHECK(gpu == NULL, "no context without a driver");
  } else {
    printf("there is a libcuda.so.1: opening without one was not tried\n");
  }
}

typedef struct {
  char *data;
  size_t bytes;
} golden_file;

static golden_file read_golden(const char *path) {
  golden_file file = {NULL, 0};
  FILE *stream = fopen(path, "rb");
  if (stream == NULL) return file;
  fseek(stream, 0, SEEK_END);
  file.bytes = (size_t)ftell(stream);
  rewind(stream);
  file.data = malloc(file.bytes + 1);
  if (fread(file.data, 1, file.bytes, stream) != file.bytes || memcmp(file.data, "VMKGOLD1", 8) != 0) file.bytes = 0;
  fclose(stream);
  return file;
}

static size_t type_bytes(const char *type) {
  const char *types[] = {"text", "u8", "bf16", "fp32", "i64", "fp64"};
  const size_t sizes[] = {1, 1, 2, 4, 8, 8};
  for (int i = 0; i < 6; i++)
    if (strcmp(type, types[i]) == 0) return sizes[i];
  return 0;
}

/* A record's data and its size in bytes; the program ends where there is none. */
static const void *record(const golden_file *file, const char *name, size_t *bytes) {
  for (size_t at = 8; at + 48 <= file->bytes;) {
    uint64_t count;
    memcpy(&count, file->data + at + 40, sizeof count);
    *bytes = (size_t)count * type_bytes(file->data + at + 32);
    if (strcmp(file->data + at, name) == 0) return file->data + at + 48;
    at += 48 + (*bytes + 7) / 8 * 8;
  }
  printf("the golden data has no %s\n", name);
  exit(1);
}

static double golden_number(const golden_file *file, const char *name) {
  size_t bytes;
  double value;
  memcpy(&value, record(file, name, &bytes), sizeof value);
  return value;
}

/* A record in device memory. */
static void *given(vmk_context *gpu, const golden_file *file, const char *name) {
  size_t bytes;
  void *memory = NULL;
  const void *data = record(file, name, &bytes);
  if (vmk_allocate(gpu, bytes, &memory) != VMK_OK || vmk_upload(gpu, memory, data, bytes) != VMK_OK) {
    printf("%s: %s\n", name, vmk_last_error());
    exit(1);
  }
  return memory;
}

/* bfloat16 device memory against a float64 answer. */
static void compare(vmk_context *gpu, const golden_file *file, const char *name, const void *memory) {
  char allowed_name[64];
  size_t bytes;
  const double *answer = record(file, name, &bytes);
  size_t count = bytes / sizeof *answer;
  snprintf(allowed_name, sizeof allowed_name, "%s_allowed", name);
  double allowed = golden_number(file, allowed_name), worst = 0;
  uint16_t *got = malloc(count * sizeof *got);
  vmk_status status = vmk_download(gpu, got, memory, count * sizeof *got);
  CHECK(status == VMK_OK, "%s: %s", name, vmk_last_error());
  for (size_t i = 0; i < count && status == VMK_OK; i++) {
    uint32_t bits = (uint32_t)got[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    double error = isnan(x) ? INFINITY : fabs(x - answer[i]);
    if (error > worst) worst = error;
  }
  CHECK(worst <= allowed, "%s: error %g, allowed %g", name, worst, allowed);
  printf("%s: %zu values, error %.3g, allowed %.3g\n", name, count, worst, allowed);
  free(got);
}

typedef struct {
  vmk_clips clips;
  int64_t D, V, M, N, K;
  void *weight, *bias, *positions, *index, *masked, *pred, *folded, *tokens, *gradient, *part;
} workload;

static workload prepare(vmk_context *gpu, const golden_file *file) {
  size_t bytes;
  const int64_t *s = record(file, "sizes", &bytes);
  workload w = {
      .clips = {given(gpu, file, "frames"), s[0], s[1], s[2], s[3]}, .D = s[4], .V = s[5], .M = s[6], .N = s[7]};
  w.K = s[8];
  w.weight = given(gpu, file, "weight");
  w.bias = given(gpu, file, "bias");
  w.positions = given(gpu, file, "positions");
  w.index = given(gpu, file, "index");
  w.masked = given(gpu, file, "masked");
  w.pred = given(gpu, file, "pred");
  /* a result has at most as many values as all tokens, or the gradient */
  CHECK(vmk_allocate(gpu, vmk_fold_bytes(w.D), &w.folded) == VMK_OK, "%s", vmk_last_error());
  CHECK(vmk_allocate(gpu, (size_t)(w.clips.B * w.N * w.D) * 2, &w.tokens) == VMK_OK, "%s", vmk_last_error());
  CHECK(vmk_allocate(gpu, (size_t)(w.clips.B * w.M * w.K) * 2, &w.gradient) == VMK_OK, "%s", vmk_last_error());
  CHECK(vmk_allocate(gpu, (size_t)(w.clips.B * w.M) * 4, &w.part) == VMK_OK, "%s", vmk_last_error());
  return w;
}

static void finish(vmk_context *gpu, const workload *w) {
  void *all[] = {(void *)(uintptr_t)w->clips.frames,
                 w->weight,
                 w->bias,
                 w->positions,
                 w->index,
                 w->masked,
                 w->pred,
                 w->folded,
                 w->tokens,
                 w->gradient,
                 w->part};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) CHECK(vmk_free(gpu, all[i]) == VMK_OK, "%s", vmk_last_error());
}

static void poison(vmk_context *gpu, void *memory, size_t bytes) {
  void *ones = malloc(bytes);
  memset(ones, 0xff, bytes); /* NaN in bfloat16 and float32 */
  CHECK(vmk_upload(gpu, memory, ones, bytes) == VMK_OK, "%s", vmk_last_error());
  free(ones);
}

static void check_loss(vmk_context *gpu, const golden_file *file, const workload *w, void *gradient) {
  double loss = NAN, answer = golden_number(file, "loss"), allowed = golden_number(file, "loss_allowed");
  int64_t count = w->clips.B * w->M;
  poison(gpu, w->part, (size_t)count * 4);
  REQUIRE_OK(
      vmk_pixel_loss(gpu, &w->clips, w->pred, w->masked, w->M, golden_number(file, "scale"), gradient, w->part, NULL));
  REQUIRE_OK(vmk_sum(gpu, w->part, count, NULL, &loss));
  CHECK(fabs(loss - answer) <= allowed, "loss %.9g, answer %.9g, allowed error %g", loss, answer, allowed);
  printf("loss %s: error %.3g, allowed %.3g\n", gradient ? "with gradient" : "alone", fabs(loss - answer), allowed);
}

/* In the order of kernels/aot/golden.py's launches. */
static void check_numbers(vmk_context *gpu, const golden_file *file, const workload *w) {
  const double mean[3] = {0.485, 0.456, 0.406}, std[3] = {0.229, 0.224, 0.225};
  size_t bytes = (size_t)(w->clips.B * w->N * w->D) * 2;
  poison(gpu, w->folded, vmk_fold_bytes(w->D));
  poison(gpu, w->tokens, bytes);
  REQUIRE_OK(vmk_fold(gpu, w->weight, w->bias, w->D, NULL, NULL, w->folded, NULL));
  REQUIRE_OK(vmk_cube_embed(gpu, &w->clips, w->index, w->V, w->folded, w->positions, w->D, w->tokens, NULL));
  compare(gpu, file, "tokens_visible", w->tokens);
  poison(gpu, w->tokens, bytes);
  REQUIRE_OK(vmk_fold(gpu, w->weight, w->bias, w->D, mean, std, w->folded, NULL));
  REQUIRE_OK(vmk_cube_embed(gpu, &w->clips, NULL, w->N, w->folded, w->positions, w->D, w->tokens, NULL));
  compare(gpu, file, "tokens_all", w->tokens);
  poison(gpu, w->gradient, (size_t)(w->clips.B * w->M * w->K) * 2);
  check_loss(gpu, file, w, NULL);
  check_loss(gpu, file, w, w->gradient);
  compare(gpu, file, "gradient", w->gradient);
}

static void check_embed_refusals(vmk_context *gpu, const workload *w) {
  const double bad[3] = {0.5, 0.0, 0.5};
  vmk_clips c = w->clips;
  char *odd = (char *)w->tokens + 2;
#define EMBED(...) vmk_cube_embed(gpu, __VA_ARGS__, NULL)
  refuses(vmk_fold(NULL, w->weight, w->bias, w->D, NULL, NULL, w->folded, NULL), VMK_INVALID, "must not be null");
  refuses(vmk_fold(gpu, NULL, w->bias, w->D, NULL, NULL, w->folded, NULL), VMK_INVALID, "must not be null");
  refuses(vmk_fold(gpu, w->weight, w->bias, 40, NULL, NULL, w->folded, NULL), VMK_INVALID, "multiple of 16");
  refuses(vmk_fold(gpu, w->weight, w->bias, w->D, bad, NULL, w->folded, NULL), VMK_INVALID, "or neither");
  refuses(vmk_fold(gpu, w->weight, w->bias, w->D, bad, bad, w->folded, NULL), VMK_INVALID, "std positive");
  refuses(vmk_fold(gpu, w->weight, w->bias, w->D, NULL, NULL, odd, NULL), VMK_INVALID, "folded must be at a multiple");
  refuses(EMBED(NULL, w->index, w->V, w->folded, w->positions, w->D, w->tokens), VMK_INVALID,
          "frames must not be null");
  refuses(EMBED(&c, w->index, w->V, w->folded, w->positions, w->D, NULL), VMK_INVALID, "must not be null");
  refuses(EMBED(&c, w->index, w->V, w->folded, w->positions, 40, w->tokens), VMK_INVALID, "multiple of 16");
  refuses(EMBED(&c, w->index, w->V, w->folded, w->positions, w->D, odd), VMK_INVALID, "out must be at a multiple");
  refuses(EMBED(&c, w->index, 0, w->folded, w->positions, w->D, w->tokens), VMK_INVALID, "V must be positive");
  refuses(EMBED(&c, w->index, INT32_MAX, w->folded, w->positions, w->D, w->tokens), VMK_INVALID, "below 2^31");
  refuses(EMBED(&c, NULL, w->V, w->folded, w->positions, w->D, w->tokens), VMK_INVALID, "all 84 cubes");
  c.B = 0;
  refuses(EMBED(&c, w->index, w->V, w->folded, w->positions, w->D, w->tokens), VMK_INVALID, "B must be");
  c = w->clips, c.H = 40;
  refuses(EMBED(&c, w->index, w->V, w->folded, w->positions, w->D, w->tokens), VMK_INVALID, "cube 2 x 16 x 16");
  c = w->clips, c.T = 3;
  refuses(EMBED(&c, w->index, w->V, w->folded, w->positions, w->D, w->tokens), VMK_INVALID, "multiples of the cube");
  c = w->clips, c.H = c.W = c.T = (int64_t)1 << 40;
  refuses(EMBED(&c, w->index, w->V, w->folded, w->positions, w->D, w->tokens), VMK_INVALID, "fewer than 2^31");
#undef EMBED
}

static void check_loss_refusals(vmk_context *gpu, const workload *w) {
  vmk_clips c = w->clips;
  double sum;
#define LOSS(...) vmk_pixel_loss(gpu, __VA_ARGS__, NULL)
  refuses(LOSS(&c, NULL, w->masked, w->M, 1, NULL, w->part), VMK_INVALID, "must not be null");
  refuses(LOSS(&c, w->pred, w->masked, 0, 1, NULL, w->part), VMK_INVALID, "M must be positive");
  refuses(LOSS(&c, w->pred, w->masked, INT32_MAX, 1, NULL, w->part), VMK_INVALID, "below 2^31");
  refuses(LOSS(&c, w->pred, w->masked, w->M, NAN, NULL, w->part), VMK_INVALID, "scale");
  refuses(LOSS(&c, (char *)w->pred + 8, w->masked, w->M, 1, NULL, w->part), VMK_INVALID, "pred must be at a multiple");
  c.W = 100;
  refuses(LOSS(&c, w->pred, w->masked, w->M, 1, NULL, w->part), VMK_INVALID, "multiples of the cube");
  refuses(vmk_sum(gpu, w->part, 0, NULL, &sum), VMK_INVALID, "count must be");
#undef LOSS
}

static int holds(int capability) {
  for (size_t i = 0; i < vmk_num_kernels(); i++)
    if (vmk_kernel_at(i)->capability == capability) return 1;
  return 0;
}

/* The code that a GPU of that capability should be given; 0 for none. */
static int code_for(int device) {
  int best = 0;
  /* from 9.0 on Triton makes code for the one capability */
  for (int code = device / 10 * 10; code <= device; code++)
    if (holds(code) && (code < 90 || code == device)) best = code;
  return best;
}

/* In the CUDA context that is current, and only then. */
static void check_current_context(void *driver) {
  int (*retain)(void **, int), (*push)(void *), (*pop)(void **);
  void *addresses[] = {dlsym(driver, "cuDevicePrimaryCtxRetain"), dlsym(driver, "cuCtxPushCurrent_v2"),
                       dlsym(driver, "cuCtxPopCurrent_v2")};
  memcpy(&retain, &addresses[0], sizeof retain);
  memcpy(&push, &addresses[1], sizeof push);
  memcpy(&pop, &addresses[2], sizeof pop);
  vmk_context *gpu = NULL;
  void *context = NULL, *memory = NULL;
  refuses(vmk_open(VMK_CURRENT_CONTEXT, &gpu), VMK_NO_DEVICE, "no CUDA context");
  CHECK(retain(&context, 0) == 0 && push(context) == 0, "the fake driver has a context");
  REQUIRE_OK(vmk_open(VMK_CURRENT_CONTEXT, &gpu));
  REQUIRE_OK(vmk_allocate(gpu, 64, &memory));
  REQUIRE_OK(vmk_free(gpu, memory));
  vmk_close(gpu);
  CHECK(pop(&context) == 0, "the library left the context current");
  CHECK(pop(&context) != 0, "nothing else is current");
}

static void test_emulated(const golden_file *file) {
  /* the library opens the same one */
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  void *connect_address = driver ? dlsym(driver, "fake_connect") : NULL;
  void *launches_address = driver ? dlsym(driver, "fake_launches") : NULL;
  CHECK(connect_address && launches_address, "libcuda.so.1 is not the fake one");
  if (connect_address == NULL || launches_address == NULL) return;
  fake_connect_function *connect;
  fake_launches_function *launches;
  memcpy(&connect, &connect_address, sizeof connect);
  memcpy(&launches, &launches_address, sizeof launches);
  const int devices[] = {75, 80, 86, 89, 90, 100, 103, 120, 121};
  for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
    vmk_context *gpu = NULL;
    int code = code_for(devices[i]);
    connect(devices[i], vmk_num_kernels(), vmk_kernel_at);
    if (code == 0) {
      refuses(vmk_open(0, &gpu), VMK_UNSUPPORTED, "no machine code");
      continue;
    }
    refuses(vmk_open(1, &gpu), VMK_NO_DEVICE, "there is no GPU 1");
    check_current_context(driver);
    REQUIRE_OK(vmk_open(0, &gpu));
    CHECK(vmk_device_capability(gpu) == devices[i] && vmk_code_capability(gpu) == code, "sm_%d got the code of sm_%d",
          devices[i], vmk_code_capability(gpu));
    printf("compute capability %d, code for sm_%d\n", devices[i], code);
    workload w = prepare(gpu, file);
    check_numbers(gpu, file, &w);
    char name[32];
    size_t bytes;
    snprintf(name, sizeof name, "launches_%d", code);
    const char *wanted = record(file, name, &bytes);
    CHECK(strcmp(launches(), wanted) == 0, "launches are\n%sand in Python\n%s", launches(), wanted);
    check_embed_refusals(gpu, &w);
    check_loss_refusals(gpu, &w);
    CHECK(strcmp(launches(), wanted) == 0, "a refusal launched something");
    finish(gpu, &w);
    vmk_close(gpu);
  }
}

static int test_device(const golden_file *file) {
  vmk_context *gpu = NULL;
  vmk_status status = vmk_open(0, &gpu);
  if (status == VMK_NO_DRIVER || status == VMK_NO_DEVICE || status == VMK_UNSUPPORTED) {
    printf("skipped: %s\n", vmk_last_error());
    return 77;
  }
  CHECK(status == VMK_OK, "%s", vmk_last_error());
  if (status != VMK_OK) return 1;
  printf("compute capability %d, code for sm_%d\n", vmk_device_capability(gpu), vmk_code_capability(gpu));
  workload w = prepare(gpu, file);
  check_numbers(gpu, file, &w);
  finish(gpu, &w);
  vmk_close(gpu);
  return failures != 0;
}

int main(int count, char **words) {
  if (count < 3) {
    printf("usage: %s tables ARCH... | emulated GOLDEN | device GOLDEN\n", words[0]);
    return 2;
  }
  if (strcmp(words[1], "tables") == 0) {
    test_tables(count - 2, words + 2);
    test_refusals_without_gpu();
  } else {
    golden_file file = read_golden(words[2]);
    if (file.bytes == 0) {
      printf("%s is no golden data\n", words[2]);
      return 1;
    }
    if (strcmp(words[1], "device") == 0) {
      int status = test_device(&file);
      free(file.data);
      return status;
    }
    test_emulated(&file);
    free(file.data);
  }
  printf("%d failures\n", failures);
  return failures != 0;
}
