package spec

import (
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const signalMark = "SIGNAL_"

// signalName is a CRI signal as Docker writes it ("SIGTERM", "SIGRTMIN+3"), "" for the default.
func signalName(s runtimeapi.Signal) string {
	if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		return ""
	}
	n := strings.TrimPrefix(s.String(), signalMark)
	return strings.NewReplacer("RTMINPLUS", "RTMIN+", "RTMAXMINUS", "RTMAX-").Replace(n)
}

// readSignal is the inverse of signalName; Docker's default is SIGTERM.
func readSignal(s string) runtimeapi.Signal {
	n := strings.ToUpper(s)
	if n == "" {
		n = "SIGTERM"
	}
	if !strings.HasPrefix(n, "SIG") {
		n = "SIG" + n
	}

	n = strings.NewReplacer("RTMIN+", "RTMINPLUS", "RTMAX-", "RTMAXMINUS").Replace(n)

	return runtimeapi.Signal(runtimeapi.Signal_value[signalMark+n])
}
