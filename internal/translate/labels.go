package translate

import (
	"strings"

	"cri-dockerd/internal/model"
)

// Labels shared by dockershim and its successors. Tools filter by them, and older shims read them
// after a hand-back. The daemon itself reads them only from objects of older shims; see record.
const (
	labelType        = "io.kubernetes.docker.type" // podsandbox or container
	labelSandboxID   = "io.kubernetes.sandbox.id"
	labelLogPath     = "io.kubernetes.container.logpath"
	labelName        = "io.kubernetes.container.name" // POD on sandboxes, the kubelet's own on containers
	typeSandbox      = "podsandbox"
	typeContainer    = "container"
	annotationPrefix = "annotation." // of labels with CRI annotations
	kubernetesPrefix = "io.kubernetes."
)

// ownPrefix is the prefix of the labels of this program. There is one label, see labelRecord.
const ownPrefix = "io.cri-dockerd."

// labelShimGroupKey makes containerd's runc shim serve several containers from one process.
const labelShimGroupKey = "io.containerd.runc.v2.group"

// isReserved reports whether the shared scheme or this program uses a key. It cannot be a key of
// CRI labels in Docker then.
func isReserved(key string, sandbox bool) bool {
	switch key {
	case labelType, labelSandboxID, labelLogPath:
		return true
	case labelName:
		return sandbox
	}
	return strings.HasPrefix(key, annotationPrefix) || strings.HasPrefix(key, ownPrefix)
}

// sharedLabels returns the labels for other tools and older shims: CRI labels, annotations with
// their prefix, and the facts of the shared scheme. CRI labels with reserved keys are only in the
// record.
func sharedLabels(r *record, facts map[string]string) map[string]string {
	out := make(map[string]string, len(r.Labels)+len(r.Annotations)+len(facts)+1)
	for k, v := range r.Labels {
		if !isReserved(k, r.Sandbox != nil) {
			out[k] = v
		}
	}

	for k, v := range r.Annotations {
		out[annotationPrefix+k] = v
	}

	for k, v := range facts {
		out[k] = v
	}

	return out
}

// readSharedLabels returns the CRI labels and annotations of an object of an older shim.
func readSharedLabels(in map[string]string, sandbox bool) (labels, annotations map[string]string) {
	labels, annotations = map[string]string{}, map[string]string{}
	for k, v := range in {
		if a, ok := strings.CutPrefix(k, annotationPrefix); ok {
			annotations[a] = v
		} else if !isReserved(k, sandbox) {
			labels[k] = v
		}
	}

	return labels, annotations
}

// withoutInherited returns a container's labels without those of its image. If the image is
// unknown, only the keys remain that every shim sets on every object.
func withoutInherited(all map[string]string, l model.ImageLabels) map[string]string {
	out := make(map[string]string, len(all))
	for k, v := range all {
		inherited, ok := l.Labels[k]
		if ok && inherited == v || l.Unknown && !isAlwaysSet(k) {
			continue
		}
		out[k] = v
	}

	return out
}

// IsEssential reports whether Read needs a label. A reader may drop other labels of a container
// with too many.
func IsEssential(key string) bool {
	switch key {
	case labelType, labelSandboxID, labelLogPath, labelName, labelRecord:
		return true
	}
	return false
}

// isAlwaysSet reports whether all shims or the kubelet set a label on each of their containers.
func isAlwaysSet(key string) bool {
	switch key {
	case labelType, labelSandboxID, labelLogPath, labelName, labelRecord:
		return true
	}
	return strings.HasPrefix(key, kubernetesPrefix+"pod.")
}
