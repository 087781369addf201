// One source, several instruction sets: the loader picks the best form on the running machine.
#pragma once

#if defined(__GNUC__)
#define KVC_INLINE __attribute__((always_inline)) inline
#define KVC_LAMBDA_INLINE __attribute__((always_inline))
#else
#define KVC_INLINE inline
#define KVC_LAMBDA_INLINE
#endif

// For free, non-template functions whose loops the compiler vectorises by itself.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define KVC_CLONES
#endif

// For loops written with vectors: RESULT NAME PARAMETERS calls BODY<lanes> ARGUMENTS with as many
// floats a vector as the instruction set has registers for. BODY is a KVC_INLINE template.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVC_BY_WIDTH(RESULT, NAME, PARAMETERS, BODY, ARGUMENTS)      \
  __attribute__((target("arch=x86-64-v4"))) RESULT NAME PARAMETERS { \
    return BODY<16> ARGUMENTS;                                       \
  }                                                                  \
  __attribute__((target("arch=x86-64-v3"))) RESULT NAME PARAMETERS { \
    return BODY<8> ARGUMENTS;                                        \
  }                                                                  \
  __attribute__((target("default"))) RESULT NAME PARAMETERS {        \
    return BODY<4> ARGUMENTS;                                        \
  }
#else
#define KVC_BY_WIDTH(RESULT, NAME, PARAMETERS, BODY, ARGUMENTS) \
  RESULT NAME PARAMETERS {                                      \
    return BODY<4> ARGUMENTS;                                   \
  }
#endif
