package translate

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestSignals(t *testing.T) {
	for n := range runtimeapi.Signal_name {
		s := runtimeapi.Signal(n)
		if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		if got := readSignal(signalName(s)); got != s {
			t.Errorf("%v, as %q, is read as %v", s, signalName(s), got)
		}
	}

	for in, want := range map[string]runtimeapi.Signal{
		"":           runtimeapi.Signal_SIGNAL_SIGTERM,
		"quit":       runtimeapi.Signal_SIGNAL_SIGQUIT,
		"SIGRTMIN+3": runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3,
		"nonsense":   runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT,
	} {
		t.Run(in, func(t *testing.T) {
			if got := readSignal(in); got != want {
				t.Errorf("readSignal(%q) = %v, want %v", in, got, want)
			}
		})
	}
}
