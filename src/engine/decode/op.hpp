#pragma once
#include "base/types.hpp"
namespace ring3::engine { enum class Op : u16 { Invalid }; enum class Feature : u8 { Base }; }
