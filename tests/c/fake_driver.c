/* A CUDA driver without a GPU: memory is the host's, and the library's kernels are run by plain loops, program by
   program as launched. It finds arguments by their names in the table, and refuses launches that a GPU would refuse. */

#include "fake_driver.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  const vmk_kernel *kernel;
  int shared_limit;
} loaded;

typedef struct {
  const vmk_kernel *kernel;
  void **values;
} call;

enum { INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

static int capability, depth;
static char primary_context;
static size_t num_kernels;
static const vmk_kernel *(*kernel_at)(size_t);
static char launches[8192];

void fake_connect(int given_capability, size_t count, const vmk_kernel *(*at)(size_t)) {
  capability = given_capability;
  num_kernels = count;
  kernel_at = at;
  launches[0] = 0;
}

const char *fake_launches(void) { return launches; }

static void *value(const call *c, const char *name) {
  for (unsigned i = 0; i < c->kernel->num_arguments; i++)
    if (strcmp(c->kernel->arguments[i].name, name) == 0) return c->values[i];
  return NULL;
}

static void *memory(const call *c, const char *name) {
  void *found = value(c, name);
  return found == NULL ? NULL : *(void **)found;
}

static int64_t number(const call *c, const char *name) {
  int32_t *found = value(c, name);
  if (found != NULL) return *found;
  for (unsigned i = 0; i < c->kernel->num_constants; i++)
    if (strcmp(c->kernel->constants[i].name, name) == 0) return c->kernel->constants[i].value;
  fprintf(stderr, "fake driver: %s has no %s\n", c->kernel->name, name);
  abort();
}

static uint16_t to_bf16(double wide) {
  float x = (float)wide;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return isnan(x) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static void run_fold(const call *c, int64_t grid) {
  const float *weight = memory(c, "weight"), *bias = memory(c, "bias"), *values = memory(c, "values");
  uint16_t *folded = memory(c, "folded");
  float *offset = memory(c, "offset");
  int64_t C = number(c, "C"), P = number(c, "P");
  for (int64_t row = 0; row < grid; row++) {
    double total = bias[row];
    for (int64_t i = 0; i < C * P; i++) {
      int64_t channel = i / P, p = i % P;
      uint16_t w = to_bf16(weight[row * C * P + i] * values[channel]);
      folded[(row * P + p) * C + channel] = w;
      total += from_bf16(w) * values[C + channel];
    }
    offset[row] = (float)total;
  }
}

typedef struct {
  int64_t C, K, run, DY, T, H, W, GRID_H, GRID_W, DT;
} shape;

static shape shape_of(const call *c) {
  int64_t C = number(c, "C"), DX = number(c, "DX"), DY = number(c, "DY"), DT = number(c, "DT");
  return (shape){C,
                 DT * DY * DX * C,
                 DX * C,
                 DY,
                 number(c, "T"),
                 number(c, "H"),
                 number(c, "W"),
                 number(c, "GRID_H"),
                 number(c, "GRID_W"),
                 DT};
}

static uint8_t pixel(const uint8_t *frames, const shape *s, int64_t clip, int64_t cube, int64_t k) {
  int64_t t = cube / (s->GRID_H * s->GRID_W) * s->DT + k / s->run / s->DY;
  int64_t y = cube / s->GRID_W % s->GRID_H * s->DY + k / s->run % s->DY;
  int64_t x = cube % s->GRID_W * (s->run / s->C) + k % s->run / s->C;
  return frames[(((clip * s->T + t) * s->H + y) * s->W + x) * s->C + k % s->C];
}

static void run_embed(const call *c, int64_t grid) {
  const uint8_t *frames = memory(c, "frames");
  const int64_t *index = memory(c, "index");
  const uint16_t *folded = memory(c, "folded");
  const float *offset = memory(c, "offset"), *positions = memory(c, "positions");
  uint16_t *out = memory(c, "out");
  int64_t R = number(c, "R"), V = number(c, "V"), N = number(c, "N"), D = number(c, "D");
  int64_t rows = number(c, "ROWS"), cols = number(c, "COLS"), across = (D + cols - 1) / cols;
  shape s = shape_of(c);
  for (int64_t i = 0; i < grid * rows * cols; i++) {
    int64_t program = i / (rows * cols);
    int64_t row = program / across * rows + i / cols % rows, col = program % across * cols + i % cols;
    if (row >= R || col >= D) continue;
    int64_t cube = index != NULL ? index[row] : row % V;
    double total = cube >= 0 && cube < N ? offset[col] + positions[cube * D + col] : NAN;
    for (int64_t k = 0; k < s.K && !isnan(total); k++)
      total += (pixel(frames, &s, row / V, cube, k) - 128) / 64.0 * from_bf16(folded[col * s.K + k]);
    out[row * D + col] = to_bf16(total);
  }
}

static void run_loss(const call *c, int64_t grid) {
  const uint16_t *pred = memory(c, "pred");
  const uint8_t *frames = memory(c, "frames");
  const int64_t *masked = memory(c, "masked");
  uint16_t *gradient = memory(c, "grad");
  float *part = memory(c, "part"), constant = *(float *)value(c, "constant");
  int64_t M = number(c, "M"), N = number(c, "N");
  shape s = shape_of(c);
  for (int64_t row = 0; row < grid; row++) {
    double error = 0, share = masked[row] >= 0 && masked[row] < N ? constant : NAN;
    int64_t cube = isnan(share) ? 0 : masked[row], P = s.K / s.C;
    for (int64_t channel = 0; channel < s.C; channel++) {
      double mean = 0, variance = 0;
      for (int64_t k = channel; k < s.K; k += s.C) mean += pixel(frames, &s, row / M, cube, k) / (double)P;
      for (int64_t k = channel; k < s.K; k += s.C) {
        double away = pixel(frames, &s, row / M, cube, k) - mean;
        variance += away * away / (double)(P - 1);
      }
      for (int64_t k = channel; k < s.K; k += s.C) {
        double target = (pixel(frames, &s, row / M, cube, k) - mean) / (sqrt(variance) + 255e-6);
        double difference = from_bf16(pred[row * s.K + k]) - target;
        error += difference * difference;
        if (gradient != NULL) gradient[row * s.K + k] = to_bf16(2 * share * difference);
      }
    }
    part[row] = (float)(error * share);
  }
}

static void note(const call *c, unsigned grid, unsigned threads) {
  size_t used = strlen(launches);
#define NOTE(...) used += (size_t)snprintf(launches + used, sizeof launches - used, __VA_ARGS__)
  NOTE("%s %u %u", c->kernel->name, grid, threads);
  for (unsigned i = 0; i < c->kernel->num_arguments; i++) {
    const vmk_parameter *argument = &c->kernel->arguments[i];
    NOTE(" %s:%s", argument->name, argument->type);
    if (strcmp(argument->type, "i32") == 0) NOTE("=%d", *(int *)c->values[i]);
    if (strcmp(argument->type, "fp32") == 0) NOTE("=%u", *(unsigned *)c->values[i]);
  }
  NOTE("\n");
#undef NOTE
}

int cuInit(unsigned flags) { return flags == 0 ? 0 : INVALID_VALUE; }
int cuGetErrorString(int error, const char **text) {
  *text = "refused by the fake driver";
  return error == 0;
}
int cuDeviceGetCount(int *count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? 0 : INVALID_DEVICE;
}
int cuDeviceGetAttribute(int *found, int attribute, int device) {
  *found = attribute == 75 ? capability / 10 : capability % 10;
  return device == 0 && (attribute == 75 || attribute == 76) ? 0 : INVALID_VALUE;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = &primary_context;
  return device == 0 ? 0 : INVALID_DEVICE;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return device == 0 ? 0 : INVALID_DEVICE; }
int cuCtxGetCurrent(void **context) {
  *context = depth > 0 ? &primary_context : NULL;
  return 0;
}
int cuCtxGetDevice(int *device) {
  *device = 0;
  return depth > 0 ? 0 : INVALID_CONTEXT;
}
int cuCtxPushCurrent_v2(void *context) {
  if (context != &primary_context) return INVALID_CONTEXT;
  depth++;
  return 0;
}
int cuCtxPopCurrent_v2(void **context) {
  *context = &primary_context;
  if (depth == 0) return INVALID_CONTEXT;
  depth--;
  return 0;
}
int cuModuleLoadData(void **module, const void *image) {
  for (size_t i = 0; i < num_kernels; i++) {
    const vmk_kernel *kernel = kernel_at(i);
    if (kernel->cubin != image) continue;
    loaded *made = calloc(1, sizeof *made);
    made->kernel = kernel;
    made->shared_limit = 48 * 1024;
    *module = made;
    return depth > 0 ? 0 : INVALID_CONTEXT;
  }
  return INVALID_IMAGE;
}
int cuModuleUnload(void *module) {
  free(module);
  return depth > 0 ? 0 : INVALID_CONTEXT;
}
int cuModuleGetFunction(void **function, void *module, const char *symbol) {
  *function = module;
  return strcmp(((loaded *)module)->kernel->symbol, symbol) == 0 ? 0 : NOT_FOUND;
}
int cuFuncSetAttribute(void *function, int attribute, int given) {
  if (attribute != 8) return INVALID_VALUE;
  ((loaded *)function)->shared_limit = given;
  return 0;
}
int cuMemAlloc_v2(uint64_t *found, size_t bytes) {
  void *made = depth > 0 ? aligned_alloc(256, (bytes + 255) / 256 * 256) : NULL;
  if (made != NULL) memset(made, 0xff, bytes); /* NaN in every dtype */
  *found = (uint64_t)(uintptr_t)made;
  return made != NULL ? 0 : 2;
}
int cuMemFree_v2(uint64_t given) {
  free((void *)(uintptr_t)given);
  return 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
  memcpy((void *)(uintptr_t)to, from, bytes);
  return depth > 0 ? 0 : INVALID_CONTEXT;
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
  memcpy(to, (void *)(uintptr_t)from, bytes);
  return depth > 0 ? 0 : INVALID_CONTEXT;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
  (void)stream;
  return cuMemcpyDtoH_v2(to, from, bytes);
}
int cuMemsetD32Async(uint64_t to, unsigned word, size_t count, void *stream) {
  (void)stream;
  for (size_t i = 0; i < count; i++) memcpy((unsigned *)(uintptr_t)to + i, &word, sizeof word);
  return depth > 0 && to % 4 == 0 ? 0 : INVALID_VALUE;
}
int cuStreamSynchronize(void *stream) {
  (void)stream;
  return depth > 0 ? 0 : INVALID_CONTEXT;
}
int cuLaunchKernel(void *function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void *stream, void **values, void **extra) {
  const loaded *module = function;
  const vmk_kernel *kernel = module->kernel;
  call c = {kernel, values};
  (void)stream;
  if (depth <= 0) return INVALID_CONTEXT;
  if (grid == 0 || grid_y * grid_z * threads_y * threads_z != 1 || extra != NULL) return INVALID_VALUE;
  if (threads != kernel->threads || shared != kernel->shared_bytes || (int)shared > module->shared_limit)
    return INVALID_VALUE;
  for (unsigned i = 0; i < kernel->trailing_pointers; i++)
    if (*(void **)values[kernel->num_arguments + i] != NULL) return INVALID_VALUE;
  note(&c, grid, threads);
  if (kernel->role == VMK_FOLD) run_fold(&c, grid);
  if (kernel->role == VMK_EMBED_VISIBLE || kernel->role == VMK_EMBED_ALL) run_embed(&c, grid);
  if (kernel->role == VMK_LOSS || kernel->role == VMK_LOSS_GRADIENT) run_loss(&c, grid);
  return 0;
}
