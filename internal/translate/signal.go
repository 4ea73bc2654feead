package translate

import (
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// signalPrefix is the prefix of the CRI's names of signals.
const signalPrefix = "SIGNAL_"

// signalName returns Docker's name of a signal ("SIGTERM", "SIGRTMIN+3"), "" for the default.
func signalName(s runtimeapi.Signal) string {
	if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		return ""
	}
	n := strings.TrimPrefix(s.String(), signalPrefix)
	return strings.NewReplacer("RTMINPLUS", "RTMIN+", "RTMAXMINUS", "RTMAX-").Replace(n)
}

// readSignal is the inverse of signalName. Docker's default is SIGTERM.
func readSignal(s string) runtimeapi.Signal {
	n := strings.ToUpper(s)
	if n == "" {
		n = "SIGTERM"
	}
	if !strings.HasPrefix(n, "SIG") {
		n = "SIG" + n
	}

	n = strings.NewReplacer("RTMIN+", "RTMINPLUS", "RTMAX-", "RTMAXMINUS").Replace(n)

	return runtimeapi.Signal(runtimeapi.Signal_value[signalPrefix+n])
}
