// NEON path. See tq.h.

#include "tq.h"

typedef int tq_neon_is_empty_here; // ISO C wants a declaration
