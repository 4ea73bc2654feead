package spec

import "strings"

// The labels that dockershim and its successors share. Tools filter by them, and older shims read
// them after a hand-back. The daemon itself reads them only from objects of older shims; see
// record.
const (
	labelType      = "io.kubernetes.docker.type" // podsandbox or container
	labelSandboxID = "io.kubernetes.sandbox.id"
	labelLogPath   = "io.kubernetes.container.logpath"
	labelName      = "io.kubernetes.container.name" // POD on sandboxes, the kubelet's own on containers
	typeSandbox    = "podsandbox"
	typeContainer  = "container"
	annotationMark = "annotation." // prefix of labels that hold CRI annotations
	kubernetesMark = "io.kubernetes."
)

// ownMark is the prefix of the labels of this program. There is one, see labelRecord.
const ownMark = "io.cri-dockerd."

// labelShimGroupKey makes containerd's runc shim serve several containers from one process.
const labelShimGroupKey = "io.containerd.runc.v2.group"

// isReserved reports whether a label of this key is not a CRI label of the object.
func isReserved(key string, sandbox bool) bool {
	switch key {
	case labelType, labelSandboxID, labelLogPath:
		return true
	case labelName:
		return sandbox
	}
	return strings.HasPrefix(key, annotationMark) || strings.HasPrefix(key, ownMark)
}

// sharedLabels are the labels that other tools and older shims read: CRI labels, annotations with
// their prefix, and the facts of the shared scheme. A CRI label with a reserved key stands in the
// record only.
func sharedLabels(r *record, facts map[string]string) map[string]string {
	out := make(map[string]string, len(r.Labels)+len(r.Annotations)+len(facts)+1)
	for k, v := range r.Labels {
		if !isReserved(k, r.Sandbox != nil) {
			out[k] = v
		}
	}

	for k, v := range r.Annotations {
		out[annotationMark+k] = v
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
		if a, ok := strings.CutPrefix(k, annotationMark); ok {
			annotations[a] = v
		} else if !isReserved(k, sandbox) {
			labels[k] = v
		}
	}

	return labels, annotations
}

// ImageLabels are the labels that a container's image brings. Docker adds each of them to the
// container unless its creator has set the key.
type ImageLabels struct {
	// Unknown says that the image cannot be read, for instance because it was removed.
	Unknown bool
	Labels  map[string]string
}

// without returns a container's labels without those that its image may have brought. Of an unknown
// image only the keys remain that every shim sets itself on every object.
func (l ImageLabels) without(all map[string]string) map[string]string {
	out := make(map[string]string, len(all))
	for k, v := range all {
		brought, ok := l.Labels[k]
		if ok && brought == v || l.Unknown && !isAlwaysSet(k) {
			continue
		}
		out[k] = v
	}

	return out
}

// IsKept reports whether a reader that cannot keep all labels of a container must keep this one.
// There are few such keys.
func IsKept(key string) bool {
	switch key {
	case labelType, labelSandboxID, labelLogPath, labelName, labelRecord:
		return true
	}
	return false
}

// isAlwaysSet reports whether every shim and the kubelet set this label on each of their
// containers.
func isAlwaysSet(key string) bool {
	switch key {
	case labelType, labelSandboxID, labelLogPath, labelName, labelRecord:
		return true
	}
	return strings.HasPrefix(key, kubernetesMark+"pod.")
}
