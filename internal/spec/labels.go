package spec

import (
	"maps"
	"strings"
)

// The labels that dockershim and its successors share.
const (
	labelType      = "io.kubernetes.docker.type" // podsandbox or container
	labelSandboxID = "io.kubernetes.sandbox.id"
	labelLogPath   = "io.kubernetes.container.logpath"
	labelName      = "io.kubernetes.container.name" // POD on sandboxes, the kubelet's own on containers
	typeSandbox    = "podsandbox"
	typeContainer  = "container"
	annotationMark = "annotation." // prefix of labels that hold CRI annotations
)

// Labels of our own, for what Docker cannot otherwise remember.
const (
	ownMark           = "io.cri-dockerd."
	labelHandler      = ownMark + "runtime-handler"
	labelPid          = ownMark + "pid"           // the pod's pid mode, which Docker knows only of its containers
	labelEscaped      = ownMark + "label."        // prefix of CRI labels that would be mistaken for one of the above
	labelImage        = ownMark + "image"         // the image's name as the kubelet asked for it
	labelImageRef     = ownMark + "image-ref"     // the image's digested name at that time
	labelImageVolumes = ownMark + "image-volumes" // JSON of the images that are mounted into the container
	LabelHolder       = ownMark + "image-volume"  // on holders: the ID of the image that is mounted
	labelLimits       = ownMark + "limits"        // JSON of the limits that Docker cannot be told
	labelPod          = ownMark + "pod"           // JSON of the pod's own resources and overhead
	labelNetNS        = ownMark + "netns"         // on sandboxes: netnsOwn if Docker's network mode "host" is not the pod's
	LabelPinned       = ownMark + "pinned"        // on images: never to be collected
	labelShimGroupKey = "io.containerd.runc.v2.group"
	netnsOwn          = "own"
)

// reserved says whether a CRI label of this key must be stored escaped.
func reserved(key string, sandbox bool) bool {
	switch key {
	case labelType, labelSandboxID, labelLogPath:
		return true
	case labelName:
		return sandbox
	}
	return strings.HasPrefix(key, annotationMark) || strings.HasPrefix(key, ownMark)
}

// writeLabels joins CRI labels and annotations and our own facts into Docker labels.
func writeLabels(labels, annotations, own map[string]string, sandbox bool) map[string]string {
	out := make(map[string]string, len(labels)+len(annotations)+len(own))
	for k, v := range labels {
		if reserved(k, sandbox) {
			k = labelEscaped + k
		}
		out[k] = v
	}
	for k, v := range annotations {
		out[annotationMark+k] = v
	}
	maps.Copy(out, own)
	return out
}

// readLabels is the inverse of writeLabels: the CRI labels and annotations in Docker labels, without our own facts.
func readLabels(in map[string]string, sandbox bool) (labels, annotations map[string]string) {
	labels, annotations = map[string]string{}, map[string]string{}
	for k, v := range in {
		if escaped, ok := strings.CutPrefix(k, labelEscaped); ok {
			labels[escaped] = v
		} else if a, ok := strings.CutPrefix(k, annotationMark); ok {
			annotations[a] = v
		} else if !reserved(k, sandbox) {
			labels[k] = v
		}
	}
	return labels, annotations
}
