// Everything of Krait's public interface.
#pragma once

#include "krait/error.h"
#include "krait/language_model.h"
#include "krait/state.h"
#include "krait/version.h"
