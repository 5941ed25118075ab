// Elementary functions on sixteen lanes. Errors stated are against the exact function, relative unless said.
#pragma once

#include "simd.h"

namespace mgk {
namespace MGK_ISA {

// 2^(whole + f) for |f| ≤ ½ and −126 ≤ whole ≤ 127, about 1e-7. 2^f by its Taylor series to the seventh power (the
// remainder is 5e-9).
MGK_INLINE F16 exp2_of_sum(I16 whole, F16 f) {
    F16 p = set1(1.5252733804059840e-5f);
    p = fma(p, f, set1(1.5403530393381609e-4f));
    p = fma(p, f, set1(1.3333558146428443e-3f));
    p = fma(p, f, set1(9.6181291076284772e-3f));
    p = fma(p, f, set1(5.5504108664821580e-2f));
    p = fma(p, f, set1(2.4022650695910072e-1f));
    p = fma(p, f, set1(6.9314718055994531e-1f));
    p = fma(p, f, set1(1.0f));
    return p * as_float(shift_left<23>(whole + int_set1(127)));
}

// 2^x for x ≤ 127; 0 below −126 (so −infinity gives exactly 0).
MGK_INLINE F16 exp2(F16 x) {
    const F16 lowest = set1(-126.0f);
    const F16 clamped = max(x, lowest);
    const I16 whole = round_to_int(clamped);
    return select_less(x, lowest, zero(), exp2_of_sum(whole, clamped - to_float(whole)));
}

// e^x for x ≤ 0; 0 below −87. ln 2 is split in two so that x − whole·ln 2 is exact to the last bit.
MGK_INLINE F16 exp_negative(F16 x) {
    const F16 lowest = set1(-87.0f), log2e = set1(1.44269504088896341f);
    const F16 clamped = max(x, lowest);
    const I16 whole = round_to_int(clamped * log2e);
    const F16 n = to_float(whole);
    const F16 rest = fma(n, set1(-1.42860682030941723e-6f), fma(n, set1(-0.693145751953125f), clamped));
    return select_less(x, lowest, zero(), exp2_of_sum(whole, rest * log2e));
}

// ln x for positive normal x, about 1e-7. x = m·2^e with m in [√½, √2); ln m by atanh series in s = (m−1)/(m+1).
MGK_INLINE F16 log(F16 x) {
    const I16 root = int_set1(0x3f3504f3);
    const I16 shifted = as_int(x) + int_set1(0x3f800000 - 0x3f3504f3);
    const F16 exponent = to_float(shift_right_signed<23>(shifted) - int_set1(127));
    const F16 m = as_float((shifted & int_set1(0x7fffff)) + root);
    const F16 s = (m - set1(1.0f)) / (m + set1(1.0f));
    const F16 s2 = s * s;
    F16 p = set1(2.0f / 11);
    p = fma(p, s2, set1(2.0f / 9));
    p = fma(p, s2, set1(2.0f / 7));
    p = fma(p, s2, set1(2.0f / 5));
    p = fma(p, s2, set1(2.0f / 3));
    const F16 ln_m = fma(p * s2, s, s + s);
    return fma(exponent, set1(0.693145751953125f), fma(exponent, set1(1.42860682030941723e-6f), ln_m));
}

// ½h(1 + erf(h/√2)), error below 2e-7·|h|: erfc(|x|) = e^{−x²}·p(1/(1 + 0.3275911|x|)), Abramowitz & Stegun 7.1.26.
MGK_INLINE F16 gelu(F16 h) {
    const F16 x = abs(h) * set1(0.70710678118654752f);
    const F16 t = set1(1.0f) / fma(x, set1(0.3275911f), set1(1.0f));
    F16 p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const F16 half_erfc = p * t * exp_negative(zero() - x * x) * set1(0.5f);
    return h * select_less(h, zero(), half_erfc, set1(1.0f) - half_erfc);
}

}  // namespace MGK_ISA
}  // namespace mgk
