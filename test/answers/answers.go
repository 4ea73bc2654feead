// Package answers checks the responses of a CRI runtime for required messages. The kubelet
// dereferences these messages without a check. A missing one crashes it again and again with a nil
// pointer, as long as the response remains the same.
package answers

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// required has the required fields of each message. The list comes from
// test/kubernetes/kubeletread: it removes each message of complete responses in turn and reports
// the panics of Kubernetes 1.36. Further entries come from the source of 1.34, 1.35 and 1.37
// (pkg/kubelet/stats, kuberuntime, pleg, metrics/collectors).
var required = map[protoreflect.FullName][]protoreflect.Name{
	// stats/cri_stats_provider*.go
	"runtime.v1.PodSandboxStats":      {"attributes", "linux"},
	"runtime.v1.ContainerStats":       {"attributes"},
	"runtime.v1.ContainerAttributes":  {"metadata"},
	"runtime.v1.PodSandboxAttributes": {"metadata"},
	"runtime.v1.NetworkUsage":         {"default_interface"},
	"runtime.v1.FilesystemUsage":      {"used_bytes"},

	// kuberuntime/*.go, and cri-client, which returns an error
	"runtime.v1.PodSandbox":       {"metadata"},
	"runtime.v1.PodSandboxStatus": {"metadata"},
	"runtime.v1.Container":        {"metadata", "image"},
	"runtime.v1.ContainerStatus":  {"metadata", "image"},

	// metrics/collectors/cri_metrics.go
	"runtime.v1.Metric": {"value"},

	// the purpose of the call
	"runtime.v1.PodSandboxStatusResponse": {"status"},
	"runtime.v1.ContainerStatusResponse":  {"status"},
	"runtime.v1.PodSandboxStatsResponse":  {"stats"},
	"runtime.v1.ContainerStatsResponse":   {"stats"},
	"runtime.v1.StatusResponse":           {"status"},
	"runtime.v1.RuntimeConfigResponse":    {"linux"},
}

// Required reports whether field is required in a message.
func Required(message protoreflect.FullName, field protoreflect.Name) bool {
	for _, name := range required[message] {
		if name == field {
			return true
		}
	}
	return false
}

// Check returns an error with the name of the first missing message in a response, as received by a
// client.
func Check(response any) error {
	m, ok := response.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is not a protobuf message", response)
	}
	return check(m.ProtoReflect(), string(m.ProtoReflect().Descriptor().Name()))
}

func check(m protoreflect.Message, path string) (err error) {
	for _, name := range required[m.Descriptor().FullName()] {
		if !m.Has(m.Descriptor().Fields().ByName(name)) {
			return fmt.Errorf("%s has no %s, required by the kubelet", path, name)
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
