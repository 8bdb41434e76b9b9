#include "krait/version.h"

#define KRAIT_STRING_OF(x) #x
#define KRAIT_STRING(x) KRAIT_STRING_OF(x)

namespace krait {

const char* version() {
  return KRAIT_STRING(KRAIT_VERSION_MAJOR) "." KRAIT_STRING(KRAIT_VERSION_MINOR) "." KRAIT_STRING(
      KRAIT_VERSION_PATCH);
}

}  // namespace krait
