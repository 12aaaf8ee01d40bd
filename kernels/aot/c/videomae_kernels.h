/* Cube embedding and pixel loss of VideoMAE on an NVIDIA GPU, without Python.

   The library holds machine code for the compute capabilities it was built for and launches it through the CUDA driver,
   libcuda.so.1, which it opens at run time: no CUDA headers or toolkit are needed to build or to link.

   Frames are uint8 [B, T, H, W, 3], T a multiple of 2, H and W of 16; a cube is 2 x 16 x 16 pixels, cube number
   (t * H/16 + h) * W/16 + w, N of them in a clip. D is a multiple of 16. Tensors are contiguous and lie in device
   memory at multiples of 16 bytes (what cudaMalloc, cuMemAlloc and vmk_allocate give is). Everything else is refused. A
   cube number outside [0, N) makes its token, or its cube's loss, NaN.

     vmk_context *gpu;
     if (vmk_open(0, &gpu) != VMK_OK) { puts(vmk_last_error()); return 1; }
     vmk_clips clips = {frames, 8, 16, 224, 224};                          // frames: uint8 [8, 16, 224, 224, 3]
     void *folded, *tokens, *part;
     double loss;
     vmk_allocate(gpu, vmk_fold_bytes(768), &folded);
     vmk_allocate(gpu, 8 * 160 * 768 * 2, &tokens);
     vmk_allocate(gpu, 8 * 1408 * 4, &part);
     vmk_fold(gpu, weight, bias, 768, NULL, NULL, folded, NULL);           // once for a set of weights
     vmk_cube_embed(gpu, &clips, visible, 160, folded, positions, 768, tokens, NULL);
     vmk_pixel_loss(gpu, &clips, pred, masked, 1408, 1.0, NULL, part, NULL);
     if (vmk_sum(gpu, part, 8 * 1408, NULL, &loss) != VMK_OK) puts(vmk_last_error());
     vmk_close(gpu);

   Several threads may use a context at a time. stream: a CUstream or cudaStream_t; NULL is the default stream. */

#ifndef VIDEOMAE_KERNELS_H
#define VIDEOMAE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  VMK_OK = 0,
  VMK_INVALID,     /* an argument is refused */
  VMK_NO_DRIVER,   /* libcuda.so.1 cannot be opened, lacks a function, or does not start */
  VMK_NO_DEVICE,   /* no GPU of that number, or no current CUDA context */
  VMK_UNSUPPORTED, /* the library holds no machine code for this GPU */
  VMK_TABLE,       /* a kernel's arguments are not those that the library fills in: their sources do not fit */
  VMK_MEMORY,      /* host or device memory ran out */
  VMK_DRIVER       /* another call of the CUDA driver failed */
} vmk_status;

const char *vmk_status_string(vmk_status status);

/* What this thread's last call that failed has to say; "" before any did. */
const char *vmk_last_error(void);

typedef struct vmk_context vmk_context;

/* Clips in device memory: frames uint8 [B, T, H, W, 3]. */
typedef struct {
  const void *frames;
  int64_t B, T, H, W;
} vmk_clips;

#define VMK_CURRENT_CONTEXT (-1)

/* Opens the driver and loads the machine code into a GPU: device's primary context, which the CUDA runtime uses too, or
   the CUDA context that is current in this thread, which must outlive what is opened. */
vmk_status vmk_open(int device, vmk_context **context);
void vmk_close(vmk_context *context);

/* The compute capability of the GPU, 90 for 9.0, and of the machine code that was chosen for it. */
int vmk_device_capability(const vmk_context *context);
int vmk_code_capability(const vmk_context *context);

/* The embedding's weight with the pixels' normalisation folded in, which vmk_cube_embed needs: it changes with the
   weight only, so a program with fixed weights folds once. The memory, vmk_fold_bytes(D) bytes of the device, is the
   caller's, who alone knows how long it is needed; nothing else is allocated and nothing waits for the GPU.

   weight: float32 [D, 3, 2, 16, 16]; bias: float32 [D]. mean, std: of red, green and blue, on pixels scaled to [0, 1],
   in host memory; both NULL for ImageNet's. vmk_fold_bytes gives 0 for a D that is refused. */
size_t vmk_fold_bytes(int64_t D);
vmk_status vmk_fold(vmk_context *context, const void *weight, const void *bias, int64_t D, const double mean[3],
                    const double std[3], void *folded, void *stream);

/* tokens bfloat16 [B, V, D] of the cubes that index, int64 [B, V], names; or [B, N, D] of all cubes, with index NULL
   and V equal to N. positions: float32 [N, D], added. */
vmk_status vmk_cube_embed(vmk_context *context, const vmk_clips *clips, const void *index, int64_t V,
                          const void *folded, const void *positions, int64_t D, void *tokens, void *stream);

/* scale times the mean squared error of pred, bfloat16 [B, M, 1536], channel fastest, against the pixels of the cubes
   that masked, int64 [B, M], names, each cube and channel normalised by its own mean and deviation.

   part: float32, B * M of them, each cube's share: the loss is their sum, which vmk_sum takes.
   gradient: of the loss in pred, bfloat16 [B, M, 1536]; NULL if it is not wanted. */
vmk_status vmk_pixel_loss(vmk_context *context, const vmk_clips *clips, const void *pred, const void *masked, int64_t M,
                          double scale, void *gradient, void *part, void *stream);

/* The sum of count float32 of device memory, taken in order in double precision on the host. Waits for the stream. */
vmk_status vmk_sum(vmk_context *context, const void *part, int64_t count, void *stream, double *sum);

/* Device memory, for programs that do not use the CUDA runtime. Uploads and downloads wait until the copy is done; they
   are in order with the default stream, not with streams made as non-blocking. */
vmk_status vmk_allocate(vmk_context *context, size_t bytes, void **memory);
vmk_status vmk_free(vmk_context *context, void *memory);
vmk_status vmk_upload(vmk_context *context, void *device, const void *host, size_t bytes);
vmk_status vmk_download(vmk_context *context, void *host, const void *device, size_t bytes);

/* The table of what the library holds: for each compute capability a kernel in each role. */
typedef enum { VMK_FOLD, VMK_EMBED_VISIBLE, VMK_EMBED_ALL, VMK_LOSS, VMK_LOSS_GRADIENT, VMK_NUM_ROLES } vmk_role;

typedef struct {
  const char *name;
  const char *type; /* as Triton spells it: "*bf16" is a pointer, "i32" and "fp32" are values */
  int aligned;      /* the machine code relies on a multiple of 16 */
} vmk_parameter;

typedef struct {
  const char *name;
  int64_t value;
} vmk_constant;

typedef struct {
  vmk_role role;
  int capability; /* 90: compute capability 9.0 */
  int exact;      /* runs on that capability only; otherwise also on later minor ones */
  const char *name, *symbol;
  unsigned shared_bytes, threads;
  unsigned trailing_pointers; /* null pointers that follow the arguments */
  const vmk_parameter *arguments;
  unsigned num_arguments;
  const vmk_constant *constants; /* whole numbers that were fixed when it was compiled */
  unsigned num_constants;
  const unsigned char *cubin;
  size_t cubin_bytes;
} vmk_kernel;

size_t vmk_num_kernels(void);
const vmk_kernel *vmk_kernel_at(size_t number); /* NULL from vmk_num_kernels() on */

/* Where the library puts a kernel's argument, in bytes; number may reach into the trailing pointers. */
vmk_status vmk_layout(const vmk_kernel *kernel, unsigned number, unsigned *offset, unsigned *size);

#ifdef __cplusplus
}
#endif

#endif
