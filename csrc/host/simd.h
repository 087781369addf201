// One source, several instruction sets: the loader picks the best clone on the running machine.
// Put it on free, non-template functions whose loops the compiler vectorises.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define KVC_CLONES
#endif
