package cri

import (
	"os"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPortForwardEntersPodNamespace enters the pinned namespace, or that of the pause process
// without a pin. It never enters the namespace of another process with a recycled PID.
func TestPortForwardEntersPodNamespace(t *testing.T) {
	s, w := newService(t)
	id := runPod(t, s, w.pod())
	request := &runtimeapi.PortForwardRequest{PodSandboxId: id, Port: []int32{80}}
	netns, err := s.OpenNetNS(id)
	if err != nil {
		t.Fatal(err)
	}

	if netns.Name() != os.DevNull { // the fake's pin
		t.Errorf("entered %s", netns.Name())
	}

	netns.Close()
	if _, err := s.PortForward(t.Context(), request); err != nil {
		t.Error(err)
	}

	w.set(w.pins, id, false)
	if netns, err := s.OpenNetNS(id); !errdefs.IsNotFound(err) {
		t.Errorf("without a pin and with a recycled PID: %v, %v", netns, err)
	}

	if _, err := s.PortForward(t.Context(), request); !errdefs.IsNotFound(err) {
		t.Errorf("got a URL for the namespace of another process: %v", err)
	}
}
