/* The C API of modcompile/engine.h, for programs in C and for other languages' foreign functions.
 *
 * Functions that can fail return a status; modcompile_last_error() then has the text, for the thread that called.
 * A pointer that is given out belongs to the engine or the context that it came from, and goes with it. */

#ifndef MODCOMPILE_ENGINE_C_H_
#define MODCOMPILE_ENGINE_C_H_

#include <stddef.h>
#include <stdint.h>

#define MODCOMPILE_C_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* The exit codes of the command line. */
typedef enum {
  MODCOMPILE_OK = 0,
  MODCOMPILE_ERROR = 1,
  MODCOMPILE_USAGE = 2,
  MODCOMPILE_UNSUPPORTED_GRAPH = 3,
  MODCOMPILE_RUNTIME_UNAVAILABLE = 5,
  MODCOMPILE_INTEGRITY = 6
} modcompile_status;

typedef enum {
  MODCOMPILE_BOOL,
  MODCOMPILE_UINT8,
  MODCOMPILE_INT8,
  MODCOMPILE_UINT16,
  MODCOMPILE_INT16,
  MODCOMPILE_UINT32,
  MODCOMPILE_INT32,
  MODCOMPILE_UINT64,
  MODCOMPILE_INT64,
  MODCOMPILE_FLOAT16,
  MODCOMPILE_BFLOAT16,
  MODCOMPILE_FLOAT32,
  MODCOMPILE_FLOAT64
} modcompile_dtype;

typedef enum { MODCOMPILE_HOST, MODCOMPILE_DEVICE } modcompile_memory;

/* A tensor, rows after rows. In the description of an engine data is NULL, and a size that varies is -1. */
typedef struct {
  const char* name;
  /* A modcompile_dtype. */
  int32_t dtype;
  size_t rank;
  const int64_t* shape;
  void* data;
  /* A modcompile_memory. */
  int32_t memory;
} modcompile_tensor;

/* Zeros stand for the defaults. */
typedef struct {
  /* Threads that one run of ONNX Runtime computes with. */
  int intra_op_threads;
  /* Not zero: our ops are run as the function bodies in the model, not by the bundle's library. */
  int without_custom_ops;
  /* The GPU's number, and a cudaStream_t to run on. */
  int device;
  void* stream;
  /* Not zero: the first run of each context is recorded as a CUDA graph. */
  int cuda_graph;
  /* ONNX Runtime's execution providers, in the place of the manifest's. */
  const char* const* providers;
  size_t provider_count;
} modcompile_options;

typedef struct modcompile_engine modcompile_engine;
typedef struct modcompile_context modcompile_context;

/* Why this thread's last call failed; "" before the first failure. */
MODCOMPILE_C_API const char* modcompile_last_error(void);

/* Checks a bundle and loads it. options may be NULL. */
MODCOMPILE_C_API modcompile_status modcompile_engine_load(const char* folder, const modcompile_options* options,
                                                          modcompile_engine** engine);
/* Contexts of the engine live on. NULL is taken. */
MODCOMPILE_C_API void modcompile_engine_free(modcompile_engine* engine);

MODCOMPILE_C_API size_t modcompile_engine_input_count(const modcompile_engine* engine);
MODCOMPILE_C_API size_t modcompile_engine_output_count(const modcompile_engine* engine);
/* NULL where the engine has no such input or output. */
MODCOMPILE_C_API const modcompile_tensor* modcompile_engine_input(const modcompile_engine* engine, size_t index);
MODCOMPILE_C_API const modcompile_tensor* modcompile_engine_output(const modcompile_engine* engine, size_t index);
/* The tokenizer's path below the bundle's folder, "" where there is none. */
MODCOMPILE_C_API const char* modcompile_engine_tokenizer(const modcompile_engine* engine);

/* What runs an engine, for one thread at a time. stream is the cudaStream_t of its runs, or NULL for the engine's. */
MODCOMPILE_C_API modcompile_status modcompile_context_make(const modcompile_engine* engine, void* stream,
                                                           modcompile_context** context);
MODCOMPILE_C_API void modcompile_context_free(modcompile_context* context);

/* Runs the engine once. Outputs that have no buffer stay with the context until its next run. engine.h says when a run
 * is waited for. inputs are read only. buffers may be NULL where their count is 0. */
MODCOMPILE_C_API modcompile_status modcompile_context_run(modcompile_context* context, const modcompile_tensor* inputs,
                                                          size_t input_count, const modcompile_tensor* buffers,
                                                          size_t buffer_count);
/* An output of the last run, in the order of the engine's; NULL where there is none. */
MODCOMPILE_C_API const modcompile_tensor* modcompile_context_output(const modcompile_context* context, size_t index);

#ifdef __cplusplus
}
#endif

#endif /* MODCOMPILE_ENGINE_C_H_ */
