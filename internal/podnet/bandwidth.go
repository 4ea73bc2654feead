package podnet

import (
	"errors"
	"fmt"
	"math"

	"cri-dockerd/internal/quantity"
)

// The annotations with which a pod asks for limits (Kubernetes documentation, "Network Plugins",
// support for traffic shaping).
const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// The plugin wants a burst with each rate: what may pass at once after a pause. It is a tenth of a
// second's worth, so that the limit is felt at once, and at least what lets the kernel keep up with
// low rates.
const (
	burstPart  = 10                 // of a second
	leastBurst = 256 << 10 * 8      // bits
	mostBurst  = math.MaxUint32 - 7 // bits; the plugin's largest is eight times as much
)

// The rates that Kubernetes permits, in bits per second ("Network Plugins", support for traffic
// shaping).
const (
	leastRate = 1e3
	mostRate  = 1e15
)

// bandwidth is the capability of that name: rates in bits per second, bursts in bits. The error
// names each annotation that is no rate.
func bandwidth(annotations map[string]string) (map[string]int64, error) {
	var errs []error
	out := map[string]int64{}
	for _, a := range []struct{ key, name string }{{ingressAnnotation, "ingress"}, {egressAnnotation, "egress"}} {
		s, ok := annotations[a.key]
		if !ok {
			continue
		}

		rate, ok := quantity.Parse(s)
		if !ok || rate < leastRate || rate > mostRate {
			errs = append(errs, fmt.Errorf("annotation %s: %q is no rate between 1k and 1P, such as 10M", a.key,
				shown([]byte(s))))
			continue
		}

		out[a.name+"Rate"] = rate
		out[a.name+"Burst"] = min(max(rate/burstPart, leastBurst), mostBurst)
	}

	return out, errors.Join(errs...)
}
