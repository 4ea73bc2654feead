package podnet

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
)

// The annotations with which a pod asks for limits (Kubernetes documentation, "Network Plugins", support for traffic shaping).
const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// The plugin wants a burst with each rate: what may pass at once after a pause. It is a tenth of a second's worth, so that the limit is felt
// at once, and at least what lets the kernel keep up with low rates.
const (
	burstPart  = 10                 // of a second
	leastBurst = 256 << 10 * 8      // bits
	mostBurst  = math.MaxUint32 - 7 // bits; the plugin's largest is eight times as much
)

// The rates that Kubernetes permits, in bits per second ("Network Plugins", support for traffic shaping).
const (
	leastRate = 1e3
	mostRate  = 1e15
)

// bandwidth is the capability of that name: rates in bits per second, bursts in bits. The error names
// each annotation that is no rate.
func bandwidth(annotations map[string]string) (map[string]int64, error) {
	var errs []error
	out := map[string]int64{}
	for _, a := range []struct{ key, name string }{{ingressAnnotation, "ingress"}, {egressAnnotation, "egress"}} {
		s, ok := annotations[a.key]
		if !ok {
			continue
		}
		rate, ok := quantity(s)
		if !ok || rate < leastRate || rate > mostRate {
			errs = append(errs, fmt.Errorf("annotation %s: %q is no rate between 1k and 1P, such as 10M", a.key, shown([]byte(s))))
			continue
		}
		out[a.name+"Rate"] = rate
		out[a.name+"Burst"] = min(max(rate/burstPart, leastBurst), mostBurst)
	}
	return out, errors.Join(errs...)
}

// quantities are Kubernetes' (apimachinery, resource.Quantity): a number and a unit or an exponent.
var quantities = regexp.MustCompile(`^(\+?[0-9]{1,30}(?:\.[0-9]{0,30})?)(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]{1,2}))?$`)

// quantity reads a quantity ("10M", "1Gi", "500k", "1e6") as a whole number, false if it is none or too
// large.
func quantity(s string) (int64, bool) {
	parts := quantities.FindStringSubmatch(s)
	if parts == nil {
		return 0, false
	}
	unit := map[string]float64{
		"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
		"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
	}[parts[2]]
	v, err := strconv.ParseFloat(parts[1], 64)
	if err != nil {
		return 0, false
	}
	if parts[3] != "" {
		exponent, _ := strconv.Atoi(parts[3])
		unit = math.Pow10(exponent)
	}
	if v*unit > math.MaxInt64/2 {
		return 0, false
	}
	return int64(v * unit), true
}
