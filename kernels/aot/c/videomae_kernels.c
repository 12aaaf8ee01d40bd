/* The CUDA driver opened at run time, the choice of machine code, and the launches behind videomae_kernels.h. */

#define _POSIX_C_SOURCE 200809L

#include "videomae_kernels.h"

#include <dlfcn.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* the generated table */
extern const vmk_kernel vmk_tables[];
extern const size_t vmk_tables_count;
extern const double vmk_imagenet_mean[3], vmk_imagenet_std[3];

#define MAX_ARGUMENTS 32
#define MAX_GRID INT32_MAX

typedef int cu_result;
typedef int cu_device;
typedef uint64_t cu_pointer;
typedef void *cu_handle; /* context, module, function or stream */

enum {
  CU_OUT_OF_MEMORY = 2,
  CU_CAPABILITY_MAJOR = 75,
  CU_CAPABILITY_MINOR = 76,
  CU_MAX_DYNAMIC_SHARED = 8,
  FREE_SHARED_BYTES = 48 * 1024 /* a kernel has to ask for more */
};

#define DRIVER_FUNCTIONS(X)                                                          \
  X(init, "cuInit", (unsigned))                                                      \
  X(error_string, "cuGetErrorString", (cu_result, const char **))                    \
  X(device_count, "cuDeviceGetCount", (int *))                                       \
  X(device_get, "cuDeviceGet", (cu_device *, int))                                   \
  X(device_attribute, "cuDeviceGetAttribute", (int *, int, cu_device))               \
  X(primary_retain, "cuDevicePrimaryCtxRetain", (cu_handle *, cu_device))            \
  X(primary_release, "cuDevicePrimaryCtxRelease_v2", (cu_device))                    \
  X(context_current, "cuCtxGetCurrent", (cu_handle *))                               \
  X(context_device, "cuCtxGetDevice", (cu_device *))                                 \
  X(context_push, "cuCtxPushCurrent_v2", (cu_handle))                                \
  X(context_pop, "cuCtxPopCurrent_v2", (cu_handle *))                                \
  X(module_load, "cuModuleLoadData", (cu_handle *, const void *))                    \
  X(module_unload, "cuModuleUnload", (cu_handle))                                    \
  X(module_function, "cuModuleGetFunction", (cu_handle *, cu_handle, const char *))  \
  X(function_set, "cuFuncSetAttribute", (cu_handle, int, int))                       \
  X(allocate, "cuMemAlloc_v2", (cu_pointer *, size_t))                               \
  X(release, "cuMemFree_v2", (cu_pointer))                                           \
  X(upload, "cuMemcpyHtoD_v2", (cu_pointer, const void *, size_t))                   \
  X(download, "cuMemcpyDtoH_v2", (void *, cu_pointer, size_t))                       \
  X(download_async, "cuMemcpyDtoHAsync_v2", (void *, cu_pointer, size_t, cu_handle)) \
  X(fill_words, "cuMemsetD32Async", (cu_pointer, unsigned, size_t, cu_handle))       \
  X(synchronize, "cuStreamSynchronize", (cu_handle))                                 \
  X(launch, "cuLaunchKernel",                                                        \
    (cu_handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, cu_handle, void **, void **))

typedef struct {
#define DECLARE(name, symbol, arguments) cu_result(*name) arguments;
  DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
} driver_functions;

struct vmk_context {
  driver_functions driver;
  cu_device device;
  cu_handle context;
  int is_primary, device_capability, code_capability;
  const vmk_kernel *kernels[VMK_NUM_ROLES];
  cu_handle modules[VMK_NUM_ROLES], functions[VMK_NUM_ROLES];
};

static _Thread_local char message[512];

static vmk_status fail(vmk_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

#define REQUIRE(condition, ...)                              \
  do {                                                       \
    if (!(condition)) return fail(VMK_INVALID, __VA_ARGS__); \
  } while (0)

#define TRY(call)                          \
  do {                                     \
    vmk_status status_ = (call);           \
    if (status_ != VMK_OK) return status_; \
  } while (0)

static vmk_status checked(const driver_functions *driver, cu_result result, const char *what) {
  const char *text = NULL;
  if (result == 0) return VMK_OK;
  if (driver->error_string(result, &text) != 0 || text == NULL) text = "unknown error";
  return fail(result == CU_OUT_OF_MEMORY ? VMK_MEMORY : VMK_DRIVER, "%s: %s (CUDA error %d)", what, text, result);
}

const char *vmk_last_error(void) { return message; }

const char *vmk_status_string(vmk_status status) {
  switch (status) {
    case VMK_OK: return "ok";
    case VMK_INVALID: return "argument refused";
    case VMK_NO_DRIVER: return "no CUDA driver";
    case VMK_NO_DEVICE: return "no such GPU";
    case VMK_UNSUPPORTED: return "no machine code for this GPU";
    case VMK_TABLE: return "kernel and library disagree on arguments";
    case VMK_MEMORY: return "out of memory";
    case VMK_DRIVER: return "CUDA driver call failed";
  }
  return "unknown status";
}

size_t vmk_num_kernels(void) { return vmk_tables_count; }

const vmk_kernel *vmk_kernel_at(size_t number) { return number < vmk_tables_count ? &vmk_tables[number] : NULL; }

static unsigned type_size(const char *type) {
  if (type[0] == '*') return 8;
  if (strcmp(type, "i64") == 0) return 8;
  if (strcmp(type, "i32") == 0 || strcmp(type, "fp32") == 0) return 4;
  return 0;
}

vmk_status vmk_layout(const vmk_kernel *kernel, unsigned number, unsigned *offset, unsigned *size) {
  REQUIRE(kernel && offset && size, "kernel, offset and size must not be null");
  REQUIRE(number < kernel->num_arguments + kernel->trailing_pointers, "%s has no argument %u", kernel->name, number);
  *offset = *size = 0;
  for (unsigned i = 0; i <= number; i++) {
    *offset += *size;
    *size = i < kernel->num_arguments ? type_size(kernel->arguments[i].type) : 8;
    if (*size == 0)
      return fail(VMK_TABLE, "%s: argument %s has the unknown type %s", kernel->name, kernel->arguments[i].name,
                  kernel->arguments[i].type);
    *offset = (*offset + *size - 1) / *size * *size;
  }
  return VMK_OK;
}

static vmk_status constant(const vmk_kernel *kernel, const char *name, int64_t *value) {
  *value = 0;
  for (unsigned i = 0; i < kernel->num_constants; i++)
    if (strcmp(kernel->constants[i].name, name) == 0) {
      *value = kernel->constants[i].value;
      return VMK_OK;
    }
  return fail(VMK_TABLE, "%s has no constant %s", kernel->name, name);
}

typedef struct {
  const char *name, *type;
  const void *pointer;
  int64_t integer;
  float real;
} argument_value;

/* Each argument of the kernel's list takes the value of its name and type, and none may be left over: a change of the
   Python kernel that the C code does not know of must not reach the GPU. */
static vmk_status pack(const vmk_kernel *kernel, const argument_value *values, unsigned count, unsigned char *buffer,
                       void **pointers) {
  unsigned total = kernel->num_arguments + kernel->trailing_pointers;
  if (total > MAX_ARGUMENTS) return fail(VMK_TABLE, "%s has %u arguments", kernel->name, total);
  memset(buffer, 0, 8 * MAX_ARGUMENTS);
  for (unsigned i = 0; i < total; i++) {
    unsigned offset, size, v = 0;
    TRY(vmk_layout(kernel, i, &offset, &size));
    pointers[i] = buffer + offset;
    if (i >= kernel->num_arguments) continue;
    const vmk_parameter *wanted = &kernel->arguments[i];
    while (v < count && strcmp(values[v].name, wanted->name) != 0) v++;
    if (v == count) return fail(VMK_TABLE, "%s: this library does not know argument %s", kernel->name, wanted->name);
    const argument_value *value = &values[v];
    if (strcmp(value->type, wanted->type) != 0)
      return fail(VMK_TABLE, "%s: argument %s is %s, not %s", kernel->name, wanted->name, wanted->type, value->type);
    const void *source = &value->real;
    int32_t narrow = (int32_t)value->integer;
    uint64_t address = (uint64_t)(uintptr_t)value->pointer;
    if (wanted->type[0] == '*') {
      REQUIRE(address != 0, "%s must not be null", wanted->name);
      REQUIRE(!wanted->aligned || address % 16 == 0, "%s must be at a multiple of 16 bytes", wanted->name);
      source = &address;
    } else if (wanted->type[0] == 'i') {
      REQUIRE(size == 8 || narrow == value->integer, "%s must be below 2^31; got %lld", wanted->name,
              (long long)value->integer);
      REQUIRE(!wanted->aligned || value->integer % 16 == 0, "%s must be a multiple of 16; got %lld", wanted->name,
              (long long)value->integer);
      source = size == 8 ? (const void *)&value->integer : &narrow;
    }
    memcpy(buffer + offset, source, size);
  }
  if (count != kernel->num_arguments)
    return fail(VMK_TABLE, "%s takes %u arguments, not %u", kernel->name, kernel->num_arguments, count);
  return VMK_OK;
}

static argument_value tensor(const char *name, const char *type, const void *memory) {
  return (argument_value){.name = name, .type = type, .pointer = memory};
}

static argument_value number(const char *name, int64_t value) {
  return (argument_value){.name = name, .type = "i32", .integer = value};
}

static vmk_status open_driver(driver_functions *driver) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return fail(VMK_NO_DRIVER, "the CUDA driver cannot be opened: %s", dlerror());
  void *found;
/* ISO C knows no cast from an object's address to a function's */
#define RESOLVE(name, symbol, arguments)                                                             \
  found = dlsym(library, symbol);                                                                    \
  if (found == NULL) return fail(VMK_NO_DRIVER, "the CUDA driver has no %s: it is too old", symbol); \
  memcpy(&driver->name, &found, sizeof found);
  DRIVER_FUNCTIONS(RESOLVE)
#undef RESOLVE
  cu_result started = driver->init(0);
  if (started == 0) return VMK_OK;
  checked(driver, started, "the CUDA driver does not start");
  return VMK_NO_DRIVER;
}

static vmk_status open_context(vmk_context *context, int device) {
  const driver_functions *driver = &context->driver;
  int count = 0, major = 0, minor = 0;
  if (device == VMK_CURRENT_CONTEXT) {
    TRY(checked(driver, driver->context_current(&context->context), "cuCtxGetCurrent"));
    if (context->context == NULL) return fail(VMK_NO_DEVICE, "no CUDA context is current in this thread");
    TRY(checked(driver, driver->context_device(&context->device), "cuCtxGetDevice"));
  } else {
    TRY(checked(driver, driver->device_count(&count), "cuDeviceGetCount"));
    if (device >= count) return fail(VMK_NO_DEVICE, "there is no GPU %d: the driver has %d", device, count);
    TRY(checked(driver, driver->device_get(&context->device, device), "cuDeviceGet"));
    TRY(checked(driver, driver->primary_retain(&context->context, context->device), "cuDevicePrimaryCtxRetain"));
    context->is_primary = 1;
  }
  TRY(checked(driver, driver->device_attribute(&major, CU_CAPABILITY_MAJOR, context->device), "capability"));
  TRY(checked(driver, driver->device_attribute(&minor, CU_CAPABILITY_MINOR, context->device), "capability"));
  context->device_capability = 10 * major + minor;
  return VMK_OK;
}

/* The newest code of the GPU's major capability that it can run. */
static vmk_status choose_kernels(vmk_context *context) {
  int device = context->device_capability, best = 0;
  for (size_t i = 0; i < vmk_tables_count; i++) {
    int code = vmk_tables[i].capability;
    int runs = vmk_tables[i].exact ? code == device : code / 10 == device / 10 && code <= device;
    if (runs && code > best) best = code;
  }
  if (best == 0)
    return fail(VMK_UNSUPPORTED, "no machine code for compute capability %d.%d: build with %d in VIDEOMAE_CUDA_ARCHS",
                device / 10, device % 10, device);
  context->code_capability = best;
  for (size_t i = 0; i < vmk_tables_count; i++)
    if (vmk_tables[i].capability == best) context->kernels[vmk_tables[i].role] = &vmk_tables[i];
  for (int role = 0; role < VMK_NUM_ROLES; role++)
    if (context->kernels[role] == NULL) return fail(VMK_TABLE, "sm_%d lacks kernel %d", best, role);
  return VMK_OK;
}

static vmk_status enter(vmk_context *context) {
  return checked(&context->driver, context->driver.context_push(context->context), "cuCtxPushCurrent");
}

/* Keeps the first failure. */
static vmk_status leave(vmk_context *context, vmk_status status) {
  cu_handle popped;
  cu_result result = context->driver.context_pop(&popped);
  return status != VMK_OK ? status : checked(&context->driver, result, "cuCtxPopCurrent");
}

static vmk_status load_kernels(vmk_context *context) {
  const driver_functions *driver = &context->driver;
  for (int role = 0; role < VMK_NUM_ROLES; role++) {
    const vmk_kernel *kernel = context->kernels[role];
    TRY(checked(driver, driver->module_load(&context->modules[role], kernel->cubin), kernel->name));
    TRY(checked(driver, driver->module_function(&context->functions[role], context->modules[role], kernel->symbol),
                kernel->name));
    if (kernel->shared_bytes > FREE_SHARED_BYTES)
      TRY(checked(driver,
                  driver->function_set(context->functions[role], CU_MAX_DYNAMIC_SHARED, (int)kernel->shared_bytes),
                  "cuFuncSetAttribute"));
  }
  return VMK_OK;
}

vmk_status vmk_open(int device, vmk_context **context) {
  REQUIRE(context, "context must not be null");
  *context = NULL;
  REQUIRE(device >= 0 || device == VMK_CURRENT_CONTEXT, "device must be a GPU's number or VMK_CURRENT_CONTEXT; got %d",
          device);
  vmk_context *opened = calloc(1, sizeof *opened);
  if (opened == NULL) return fail(VMK_MEMORY, "out of host memory");
  vmk_status status = open_driver(&opened->driver);
  if (status == VMK_OK) status = open_context(opened, device);
  if (status == VMK_OK) status = choose_kernels(opened);
  if (status == VMK_OK) {
    status = enter(opened);
    if (status == VMK_OK) status = leave(opened, load_kernels(opened));
  }
  if (status == VMK_OK)
    *context = opened;
  else
    vmk_close(opened);
  return status;
}

void vmk_close(vmk_context *context) {
  if (context == NULL) return;
  driver_functions *driver = &context->driver;
  /* what fails here has no one to tell: the context may be gone already at the end of a program */
  if (context->modules[0] != NULL && driver->context_push(context->context) == 0) {
    cu_handle popped;
    for (int role = 0; role < VMK_NUM_ROLES; role++)
      if (context->modules[role] != NULL) driver->module_unload(context->modules[role]);
    driver->context_pop(&popped);
  }
  if (context->is_primary) driver->primary_release(context->device);
  /* the driver stays loaded: it has threads and exit handlers of its own */
  free(context);
}

int vmk_device_capability(const vmk_context *context) { return context ? context->device_capability : 0; }
int vmk_code_capability(const vmk_context *context) { return context ? context->code_capability : 0; }

static cu_pointer address(const void *memory) { return (cu_pointer)(uintptr_t)memory; }

vmk_status vmk_allocate(vmk_context *context, size_t bytes, void **memory) {
  REQUIRE(context && memory, "context and memory must not be null");
  *memory = NULL;
  cu_pointer found = 0;
  TRY(enter(context));
  TRY(leave(context, checked(&context->driver, context->driver.allocate(&found, bytes), "cuMemAlloc")));
  *memory = (void *)(uintptr_t)found;
  return VMK_OK;
}

vmk_status vmk_free(vmk_context *context, void *memory) {
  REQUIRE(context, "context must not be null");
  if (memory == NULL) return VMK_OK;
  TRY(enter(context));
  return leave(context, checked(&context->driver, context->driver.release(address(memory)), "cuMemFree"));
}

vmk_status vmk_upload(vmk_context *context, void *device, const void *host, size_t bytes) {
  REQUIRE(context && device && host, "context, device and host must not be null");
  TRY(enter(context));
  return leave(context,
               checked(&context->driver, context->driver.upload(address(device), host, bytes), "cuMemcpyHtoD"));
}

vmk_status vmk_download(vmk_context *context, void *host, const void *device, size_t bytes) {
  REQUIRE(context && host && device, "context, host and device must not be null");
  TRY(enter(context));
  return leave(context,
               checked(&context->driver, context->driver.download(host, address(device), bytes), "cuMemcpyDtoH"));
}

vmk_status vmk_sum(vmk_context *context, const void *part, int64_t count, void *stream, double *sum) {
  REQUIRE(context && part && sum, "context, part and sum must not be null");
  REQUIRE(count > 0 && count <= MAX_GRID, "count must be in [1, 2^31); got %lld", (long long)count);
  const driver_functions *driver = &context->driver;
  size_t bytes = (size_t)count * sizeof(float);
  float *parts = malloc(bytes);
  if (parts == NULL) return fail(VMK_MEMORY, "out of host memory");
  vmk_status status = enter(context);
  if (status == VMK_OK) {
    status = checked(driver, driver->download_async(parts, address(part), bytes, stream), "cuMemcpyDtoHAsync");
    if (status == VMK_OK) status = checked(driver, driver->synchronize(stream), "cuStreamSynchronize");
    status = leave(context, status);
  }
  if (status == VMK_OK) {
    *sum = 0;
    for (int64_t i = 0; i < count; i++) *sum += parts[i];
  }
  free(parts);
  return status;
}

static vmk_status start(vmk_context *context, vmk_role role, int64_t grid, const argument_value *values, unsigned count,
                        void *stream) {
  const vmk_kernel *kernel = context->kernels[role];
  _Alignas(8) unsigned char buffer[8 * MAX_ARGUMENTS];
  void *pointers[MAX_ARGUMENTS];
  REQUIRE(grid > 0 && grid <= MAX_GRID, "too many values for one launch: it would take %lld programs", (long long)grid);
  TRY(pack(kernel, values, count, buffer, pointers));
  TRY(enter(context));
  cu_result result = context->driver.launch(context->functions[role], (unsigned)grid, 1, 1, kernel->threads, 1, 1,
                                            kernel->shared_bytes, stream, pointers, NULL);
  return leave(context, checked(&context->driver, result, kernel->name));
}

/* The sizes that both operations' kernels take, and N. */
typedef struct {
  int64_t N, T, H, W, grid_h, grid_w, pixels, C;
} geometry;

static vmk_status measure(const vmk_kernel *kernel, const vmk_clips *clips, geometry *found) {
  REQUIRE(clips && clips->frames, "clips and frames must not be null");
  int64_t dt, dy, dx, C, T = clips->T, H = clips->H, W = clips->W;
  TRY(constant(kernel, "DT", &dt));
  TRY(constant(kernel, "DY", &dy));
  TRY(constant(kernel, "DX", &dx));
  TRY(constant(kernel, "C", &C));
  REQUIRE(clips->B > 0 && clips->B <= MAX_GRID, "B must be in [1, 2^31); got %lld", (long long)clips->B);
  REQUIRE(T > 0 && H > 0 && W > 0 && T % dt == 0 && H % dy == 0 && W % dx == 0,
          "T, H and W must be multiples of the cube %lld x %lld x %lld; got %lld x %lld x %lld", (long long)dt,
          (long long)dy, (long long)dx, (long long)T, (long long)H, (long long)W);
  /* offsets inside a clip are 32 bits wide; divided, because the product may not fit 64 */
  REQUIRE(T <= MAX_GRID / C / H / W, "a clip must have fewer than 2^31 values; got %lld x %lld x %lld x %lld",
          (long long)T, (long long)H, (long long)W, (long long)C);
  *found = (geometry){T / dt * (H / dy) * (W / dx), T, H, W, H / dy, W / dx, dt * dy * dx, C};
  return VMK_OK;
}

static int64_t ceil_divide(int64_t x, int64_t y) { return (x + y - 1) / y; }

typedef struct {
  int64_t C, K;
  size_t offset, values, bytes; /* where bias and constants lie after the weight, and the end */
} fold_layout;

/* Offsets into weight and positions are 32 bits wide. */
static vmk_status lay_out_fold(const vmk_kernel *kernel, int64_t D, fold_layout *found) {
  int64_t P;
  TRY(constant(kernel, "P", &P));
  TRY(constant(kernel, "C", &found->C));
  found->K = P * found->C;
  REQUIRE(D > 0 && D % 16 == 0 && D <= MAX_GRID / found->K,
          "D must be a positive multiple of 16, at most %lld; got %lld", (long long)(MAX_GRID / found->K / 16 * 16),
          (long long)D);
  found->offset = (size_t)(D * found->K) * 2;
  found->values = found->offset + (size_t)D * sizeof(float);
  found->bytes = found->values + 2 * (size_t)found->C * sizeof(float);
  return VMK_OK;
}

size_t vmk_fold_bytes(int64_t D) {
  fold_layout layout;
  for (size_t i = 0; i < vmk_tables_count; i++)
    if (vmk_tables[i].role == VMK_FOLD) return lay_out_fold(&vmk_tables[i], D, &layout) == VMK_OK ? layout.bytes : 0;
  return 0;
}

/* s and o of every channel, as kernels/cube_embed.py names them. Memsets, not a copy: they need no host memory that
   would have to outlive the call, and may be captured into a graph. */
static vmk_status fill_values(vmk_context *context, const double *mean, const double *std, int64_t channels,
                              void *values, void *stream) {
  for (int64_t i = 0; i < 2 * channels; i++) {
    float value = (float)(i < channels ? 64 / (255 * std[i]) : (128 - 255 * mean[i - channels]) / 64);
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    TRY(checked(&context->driver, context->driver.fill_words(address((float *)values + i), bits, 1, stream),
                "cuMemsetD32Async"));
  }
  return VMK_OK;
}

vmk_status vmk_fold(vmk_context *context, const void *weight, const void *bias, int64_t D, const double mean[3],
                    const double std[3], void *folded, void *stream) {
  REQUIRE(context && weight && bias && folded, "context, weight, bias and folded must not be null");
  REQUIRE((mean == NULL) == (std == NULL), "give both mean and std, or neither");
  if (mean == NULL) {
    mean = vmk_imagenet_mean;
    std = vmk_imagenet_std;
  }
  fold_layout layout;
  TRY(lay_out_fold(context->kernels[VMK_FOLD], D, &layout));
  if (layout.C != 3) return fail(VMK_TABLE, "the kernel is for %lld channels", (long long)layout.C);
  for (int c = 0; c < 3; c++)
    REQUIRE(isfinite(mean[c]) && isfinite(std[c]) && std[c] > 0, "mean and std must be finite, and std positive");
  char *memory = folded;
  REQUIRE(address(folded) % 16 == 0, "folded must be at a multiple of 16 bytes");
  TRY(enter(context));
  TRY(leave(context, fill_values(context, mean, std, layout.C, memory + layout.values, stream)));
  const argument_value values[] = {
      tensor("weight", "*fp32", weight),
      tensor("bias", "*fp32", bias),
      tensor("values", "*fp32", memory + layout.values),
      tensor("folded", "*bf16", memory),
      tensor("offset", "*fp32", memory + layout.offset),
  };
  return start(context, VMK_FOLD, D, values, sizeof values / sizeof *values, stream);
}

vmk_status vmk_cube_embed(vmk_context *context, const vmk_clips *clips, const void *index, int64_t V,
                          const void *folded, const void *positions, int64_t D, void *tokens, void *stream) {
  REQUIRE(context && folded && positions && tokens, "context, folded, positions and tokens must not be null");
  vmk_role role = index != NULL ? VMK_EMBED_VISIBLE : VMK_EMBED_ALL;
  const vmk_kernel *kernel = context->kernels[role];
  int64_t rows, cols;
  geometry g;
  fold_layout layout;
  TRY(measure(kernel, clips, &g));
  TRY(lay_out_fold(context->kernels[VMK_FOLD], D, &layout));
  TRY(constant(kernel, "ROWS", &rows));
  TRY(constant(kernel, "COLS", &cols));
  REQUIRE(index != NULL || V == g.N, "without index V must be all %lld cubes; got %lld", (long long)g.N, (long long)V);
  REQUIRE(V > 0 && V <= (MAX_GRID - rows) / clips->B, "V must be positive and B * V below 2^31; got %lld x %lld",
          (long long)clips->B, (long long)V);
  REQUIRE(g.N <= MAX_GRID / D, "positions must have fewer than 2^31 values; got %lld x %lld", (long long)g.N,
          (long long)D);
  argument_value values[] = {
      tensor("frames", "*u8", clips->frames),
      tensor("folded", "*bf16", folded),
      tensor("offset", "*fp32", (const char *)folded + layout.offset),
      tensor("positions", "*fp32", positions),
      tensor("out", "*bf16", tokens),
      number("R", clips->B * V),
      number("V", V),
      number("N", g.N),
      number("T", g.T),
      number("H", g.H),
      number("W", g.W),
      number("GRID_H", g.grid_h),
      number("GRID_W", g.grid_w),
      number("D", D),
      tensor("index", "*i64", index),
  };
  unsigned count = sizeof values / sizeof *values - (index == NULL);
  return start(context, role, ceil_divide(clips->B * V, rows) * ceil_divide(D, cols), values, count, stream);
}

vmk_status vmk_pixel_loss(vmk_context *context, const vmk_clips *clips, const void *pred, const void *masked, int64_t M,
                          double scale, void *gradient, void *part, void *stream) {
  REQUIRE(context && pred && masked && part, "context, pred, masked and part must not be null");
  vmk_role role = gradient != NULL ? VMK_LOSS_GRADIENT : VMK_LOSS;
  geometry g;
  TRY(measure(context->kernels[role], clips, &g));
  REQUIRE(M > 0 && M <= MAX_GRID / clips->B, "M must be positive and B * M below 2^31; got %lld x %lld",
          (long long)clips->B, (long long)M);
  REQUIRE(isfinite(scale), "scale must be finite");
  argument_value share = {.name = "constant", .type = "fp32"};
  share.real = (float)(1.0 / (double)(clips->B * M * g.pixels * g.C) * scale);
  argument_value values[] = {
      tensor("pred", "*bf16", pred),
      tensor("frames", "*u8", clips->frames),
      tensor("masked", "*i64", masked),
      tensor("part", "*fp32", part),
      share,
      number("M", M),
      number("N", g.N),
      number("T", g.T),
      number("H", g.H),
      number("W", g.W),
      number("GRID_H", g.grid_h),
      number("GRID_W", g.grid_w),
      tensor("grad", "*bf16", gradient),
  };
  unsigned count = sizeof values / sizeof *values - (gradient == NULL);
  return start(context, role, clips->B * M, values, count, stream);
}
