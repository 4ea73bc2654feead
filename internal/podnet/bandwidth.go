package podnet

import (
	"math"
	"strconv"
	"strings"
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

// bandwidth is the capability of that name: rates in bits per second, bursts in bits. Annotations that are no quantity were refused by the
// kubelet before and are left out.
func bandwidth(annotations map[string]string) map[string]int64 {
	out := map[string]int64{}
	for _, a := range []struct{ key, name string }{{ingressAnnotation, "ingress"}, {egressAnnotation, "egress"}} {
		if rate, ok := quantity(annotations[a.key]); ok && rate > 0 {
			out[a.name+"Rate"], out[a.name+"Burst"] = rate, min(max(rate/burstPart, leastBurst), mostBurst)
		}
	}
	return out
}

// quantity reads a Kubernetes quantity ("10M", "1Gi", "500k", "1e6") as a whole number.
func quantity(s string) (int64, bool) {
	number := strings.TrimRight(s, "numkKMGTPEi")
	unit, ok := map[string]float64{
		"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "m": 1e-3,
		"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
	}[s[len(number):]]
	v, err := strconv.ParseFloat(number, 64)
	if !ok || err != nil || v < 0 || v*unit > math.MaxInt64/2 {
		return 0, false
	}
	return int64(v * unit), true
}
