package quantity

import (
	"fmt"
	"math"
	"math/big"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]int64{
		"7": 7, "+7": 7, "-7": -7, "007": 7, "7.": 7, ".5": 1, "0": 0, "-0": 0, "0.000": 0,
		"10M": 1e7, "500k": 5e5, "1.5M": 15e5, "1P": 1e15, "1E": 1e18, "2G": 2e9, "3T": 3e12,
		"1Ki": 1 << 10, "1Mi": 1 << 20, "1Gi": 1 << 30, "1Ti": 1 << 40, "1Pi": 1 << 50, "1Ei": 1 << 60, "1.5Ki": 1536,
		"1e9": 1e9, "1E9": 1e9, "1e+2": 100, "1.5e3": 1500, "100e-2": 1, "-1e3": -1000,
		"1000m": 1, "1500m": 2, "-1500m": -2, "1m": 1, "1u": 1, "1n": 1, "1000000u": 1, "1e-300": 1, "0e-300": 0,
		"9223372036854775807": math.MaxInt64, "9223372036854775808": math.MaxInt64, "8Ei": math.MaxInt64,
		"1e300": math.MaxInt64, "-1e999999999": -math.MaxInt64, "0e999999999": 0,
	} {
		t.Run(in, func(t *testing.T) {
			if got, ok := Parse(in); !ok || got != want {
				t.Errorf("got %d, %v; want %d", got, ok, want)
			}
		})
	}

	for _, bad := range []string{
		"", "M", "+", "-", ".", "e3", "1x", "1MM", "9E9E", "1 M", " 1", "1 ", "1e", "1e+", "1e1.5", "1i", "1mi", "1ki",
		"1K", "1e3M",
		"1.2.3", "--1", "+-1", "0x10", "1_000", "Inf", "NaN", "1e99999999999999999999", "١", "10%",
		strings.Repeat("1", maxLength+1),
	} {
		t.Run(bad, func(t *testing.T) {
			if got, ok := Parse(bad); ok {
				t.Errorf("got %d, want an error", got)
			}
		})
	}
}

// TestParseIsExact compares Parse with exact fractions, for every suffix.
func TestParseIsExact(t *testing.T) {
	factors := map[string]string{
		"": "1", "n": "1/1000000000", "u": "1/1000000", "m": "1/1000", "k": "1000", "M": "1000000", "G": "1000000000",
		"T": "1000000000000", "P": "1000000000000000", "E": "1000000000000000000",
		"Ki": "1024", "Mi": "1048576", "Gi": "1073741824", "Ti": "1099511627776", "Pi": "1125899906842624",
		"Ei": "1152921504606846976",
	}

	suffixes := rapid.SampledFrom([]string{"", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti",
		"Pi", "Ei", "e"})
	rapid.Check(t, func(t *rapid.T) {
		number := rapid.StringMatching(`[+-]?[0-9]{1,22}(\.[0-9]{0,22})?`).Draw(t, "number")
		suffix := suffixes.Draw(t, "suffix")
		in := number + suffix
		want, _ := new(big.Rat).SetString(number)
		if suffix == "e" {
			exponent := rapid.IntRange(-40, 40).Draw(t, "exponent")
			in += fmt.Sprint(exponent)
			want, _ = new(big.Rat).SetString(in)
		} else {
			factor, _ := new(big.Rat).SetString(factors[suffix])
			want.Mul(want, factor)
		}

		got, ok := Parse(in)
		if !ok {
			t.Fatalf("%q: not a quantity", in)
		}

		limit := new(big.Rat).SetInt64(math.MaxInt64)
		size, value := new(big.Rat).Abs(want), new(big.Rat).SetInt64(got)
		value.Abs(value)
		switch {
		case want.Sign() != 0 && got != 0 && want.Sign() != new(big.Rat).SetInt64(got).Sign():
			t.Errorf("%q: got %d, wrong sign", in, got)
		case size.Cmp(limit) > 0 && value.Cmp(limit) != 0:
			t.Errorf("%q: got %d, want the limit", in, got)
		case size.Cmp(limit) <= 0 && (value.Cmp(size) < 0 || value.Sub(value, size).Cmp(big.NewRat(1, 1)) >= 0):
			t.Errorf("%q: got %d, not rounded away from zero", in, got)
		}
	})
}

// FuzzParse checks that Parse returns 0 with every error and never returns math.MinInt64.
func FuzzParse(f *testing.F) {
	f.Add("1e9")
	f.Add("-1.5Ki")
	f.Add("1e-999999999999999999")
	f.Fuzz(func(t *testing.T, s string) {
		if v, ok := Parse(s); !ok && v != 0 || v == math.MinInt64 {
			t.Errorf("%q: got %d, %v", s, v, ok)
		}
	})
}
