// The products of one block type, KIND, as a library of its own (see products.h).

#include "products.h"

extern "C" const Functions *functions() { return &FUNCTIONS<KIND>; }
