// Package answers checks answers of a CRI runtime for the messages that a kubelet uses without a
// check. One that is missing kills the kubelet with a nil pointer, and it dies again after each
// restart as long as the answer stays the same.
package answers

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// required are the messages that must be present in a message that is present itself, by name. The
// list is the kubelet's own: test/kubernetes/kubeletread removes each message of full answers in
// turn and reports those without which Kubernetes 1.36 panics. The code of 1.34, 1.35 and 1.37 was
// read for further ones (pkg/kubelet/stats, kuberuntime, pleg, metrics/collectors).
var required = map[protoreflect.FullName][]protoreflect.Name{
	// stats/cri_stats_provider*.go
	"runtime.v1.PodSandboxStats":      {"attributes", "linux"},
	"runtime.v1.ContainerStats":       {"attributes"},
	"runtime.v1.ContainerAttributes":  {"metadata"},
	"runtime.v1.PodSandboxAttributes": {"metadata"},
	"runtime.v1.NetworkUsage":         {"default_interface"},
	"runtime.v1.FilesystemUsage":      {"used_bytes"},

	// kuberuntime/*.go, and cri-client, which refuses them with an error
	"runtime.v1.PodSandbox":       {"metadata"},
	"runtime.v1.PodSandboxStatus": {"metadata"},
	"runtime.v1.Container":        {"metadata", "image"},
	"runtime.v1.ContainerStatus":  {"metadata", "image"},

	// metrics/collectors/cri_metrics.go
	"runtime.v1.Metric": {"value"},

	// What a call is for.
	"runtime.v1.PodSandboxStatusResponse": {"status"},
	"runtime.v1.ContainerStatusResponse":  {"status"},
	"runtime.v1.PodSandboxStatsResponse":  {"stats"},
	"runtime.v1.ContainerStatsResponse":   {"stats"},
	"runtime.v1.StatusResponse":           {"status"},
	"runtime.v1.RuntimeConfigResponse":    {"linux"},
}

// Required says whether field must be present in each message of that name.
func Required(message protoreflect.FullName, field protoreflect.Name) bool {
	for _, name := range required[message] {
		if name == field {
			return true
		}
	}
	return false
}

// Check returns an error that names the first missing message in an answer, as a client receives
// it.
func Check(answer any) error {
	m, ok := answer.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is no protobuf message", answer)
	}
	return check(m.ProtoReflect(), string(m.ProtoReflect().Descriptor().Name()))
}

func check(m protoreflect.Message, path string) (err error) {
	for _, name := range required[m.Descriptor().FullName()] {
		if !m.Has(m.Descriptor().Fields().ByName(name)) {
			return fmt.Errorf("%s has no %s, which a kubelet uses without a check", path, name)
		}
	}

	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		below := path + "." + string(f.Name())
		switch {
		case f.Kind() != protoreflect.MessageKind || f.IsMap():
		case f.IsList():
			for i := range v.List().Len() {
				if err = check(v.List().Get(i).Message(), fmt.Sprintf("%s[%d]", below, i)); err != nil {
					break
				}
			}

		default:
			err = check(v.Message(), below)
		}

		return err == nil
	})

	return err
}
