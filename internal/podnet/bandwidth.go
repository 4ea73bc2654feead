package podnet

import (
	"errors"
	"fmt"
	"math"

	"cri-dockerd/internal/quantity"
)

// Annotations for bandwidth limits of a pod (Kubernetes documentation, "Network Plugins", support
// for traffic shaping).
const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// The plugin requires a burst for each rate: the amount sent at once after a pause. It is a tenth
// of a second's traffic, so that the limit takes effect quickly. At low rates it is minBurst, so
// that the kernel can keep up.
const (
	burstFraction = 10                 // of a second
	minBurst      = 256 << 10 * 8      // bits
	maxBurst      = math.MaxUint32 - 7 // bits; the plugin's maximum is eight times as much
)

// Kubernetes' limits of rates, in bits per second ("Network Plugins", support for traffic shaping).
const (
	minRate = 1e3
	maxRate = 1e15
)

// bandwidth returns the capability of that name: rates in bits per second, bursts in bits. The
// error names each invalid annotation.
func bandwidth(annotations map[string]string) (map[string]int64, error) {
	var errs []error
	out := map[string]int64{}
	for _, a := range []struct{ key, name string }{{ingressAnnotation, "ingress"}, {egressAnnotation, "egress"}} {
		s, ok := annotations[a.key]
		if !ok {
			continue
		}

		rate, ok := quantity.Parse(s)
		if !ok || rate < minRate || rate > maxRate {
			errs = append(errs, fmt.Errorf("annotation %s: %q is not a rate between 1k and 1P, such as 10M", a.key,
				excerpt([]byte(s))))
			continue
		}

		out[a.name+"Rate"] = rate
		out[a.name+"Burst"] = min(max(rate/burstFraction, minBurst), maxBurst)
	}

	return out, errors.Join(errs...)
}
