// Package quantity parses Kubernetes' resource quantities, such as 10M, 1Gi, 500m and 1e9
// (resource.Quantity in apimachinery). It replaces the library to keep apimachinery out of the
// binary.
package quantity

import (
	"math"
	"math/big"
	"regexp"
	"strconv"
	"strings"
)

// maxLength is the maximum length of a quantity in bytes.
const maxLength = 128

// grammar has the groups sign, integer part, fraction, suffix and exponent.
var grammar = regexp.MustCompile(`^([+-]?)([0-9]*)(?:\.([0-9]*))?(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]{1,18}))?$`)

// Parse returns a quantity as an integer. Like Quantity.Value, it rounds away from zero and limits
// the result to ±(2^63-1). ok is false if s is not a quantity.
func Parse(s string) (value int64, ok bool) {
	if len(s) > maxLength {
		return 0, false
	}

	m := grammar.FindStringSubmatch(s)
	if m == nil || m[2]+m[3] == "" {
		return 0, false
	}

	digits, _ := new(big.Int).SetString(m[2]+m[3], 10)
	binary, decimal := exponents(m[4], m[5])
	value = scale(digits, binary, decimal-len(m[3]))
	if m[1] == "-" {
		value = -value
	}

	return value, true
}

// exponents returns the powers of 2 and of 10 of a suffix or an exponent.
func exponents(suffix, exponent string) (binary, decimal int) {
	if prefix, isBinary := strings.CutSuffix(suffix, "i"); isBinary {
		return 10 * (1 + strings.Index("KMGTPE", prefix)), 0
	}
	if suffix != "" {
		return 0, 3*strings.Index("num kMGTPE", suffix) - 9
	}

	n, _ := strconv.Atoi(exponent)

	return 0, max(-maxExponent, min(n, maxExponent))
}

// maxExponent is large enough: greater exponents do not change a limited result of maxLength
// digits.
const maxExponent = 2 * maxLength

// scale returns digits * 2^binary * 10^decimal, rounded up and limited to math.MaxInt64. digits is
// not negative.
func scale(digits *big.Int, binary, decimal int) int64 {
	power := func(n int) *big.Int { return new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(n)), nil) }
	digits.Lsh(digits, uint(binary))
	digits.Mul(digits, power(max(decimal, 0)))
	if _, remainder := digits.QuoRem(digits, power(max(-decimal, 0)), new(big.Int)); remainder.Sign() > 0 {
		digits.Add(digits, big.NewInt(1))
	}
	if !digits.IsInt64() {
		return math.MaxInt64
	}

	return digits.Int64()
}
