.DEFAULT_GOAL := help
GO ?= go
export GOFLAGS ?= -buildvcs=false
VERSION ?= 1.0.0-dev
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
# Without grpcnotrace, gRPC links html/template, and with it every exported method of the program: 4 MB.
# Without nri_no_wasm, NRI links a WebAssembly runtime.
TAGS = grpcnotrace nri_no_wasm
BIN ?= bin/cri-dockerd
PREFIX ?= /usr/local
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16
build: ## the static binaries: bin/cri-dockerd, and the containerd shim beside it
	CGO_ENABLED=0 $(GO) build -trimpath -tags '$(TAGS)' -ldflags '-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)' -o $(BIN) ./cmd/cri-dockerd
	CGO_ENABLED=0 $(GO) build -trimpath -tags '$(TAGS)' -ldflags '-s -w' -o $(dir $(BIN)) ./cmd/containerd-shim-cri-dockerd-v1 ./cmd/containerd-shim-cri-dockerd-server
demo: ## engine, daemon, a pod through it, its page
	hack/install-deps.sh
	$(MAKE) build
	hack/demo.sh
test: engines ## all tests: units, conformance on both engines, the real kubelet
	hack/kubernetes.sh cluster
	$(GO) vet ./...
	test -z "$$(gofmt -l cmd internal test)"
	$(GO) test -race -shuffle=on -timeout 60m ./...
conformance: $(if $(ENDPOINT),,engines) ## the CRI through gRPC; ENGINE=20.10, 26.1, 29 or all, CONTAINERS=engine for pods without the containerd shim, ENDPOINT=unix:///… for a runtime of this machine that runs already, RUN=pattern of tests
	$(GO) test -race -count=1 -timeout $(if $(ENDPOINT),3h,90m) ./test/conformance $(if $(RUN),-run '$(RUN)') $(if $(ENDPOINT),-endpoint=$(ENDPOINT))
conformance-node: deps ## the same through the socket of a node of its own, with the package and the systemd cgroup driver
	$(GO) test -race -count=1 -v -timeout 90m ./test/conformance -run TestEndpointOfANode -node-tests .
fuzz: ## fuzz what reads foreign data, each target with some thousand inputs, or for FUZZTIME (30m)
	hack/fuzz.sh $(FUZZTIME)
audit: ## known vulnerabilities and insecure patterns
	hack/audit.sh
e2e: engines ## the real kubelet; ENGINE=20.10, 26.1, 29 or all, KUBERNETES=1.34.4, 1.35.4 or 1.36.3 for an older kubelet
	$(GO) test -race -count=1 -timeout 60m ./test/e2e
cluster: engines ## a kubeadm cluster of NODES (3): CNI=flannel, bridge or cilium (KUBE_PROXY=replaced), ENGINE=20.10 or 29, KUBERNETES; DRILLS=1 for faults on a node
	hack/kubernetes.sh cluster
	$(if $(filter cilium,$(CNI)),hack/cilium.sh)
	$(GO) test -count=1 -v -timeout 60m ./test/cluster -nodes $(or $(NODES),3) $(if $(DRILLS),-drills,-full) \
		-cni $(or $(CNI),flannel)$(if $(filter replaced,$(KUBE_PROXY)),-no-kube-proxy)
e2e-cluster: engines ## Kubernetes' conformance tests of nodes, network and storage on a cluster of NODES (3); FOCUS, SKIP, SHARD=1/4, PROCS (4), RESUME=1, CNI, ENGINE
	hack/kubernetes.sh cluster kubelet e2e && hack/busybox.sh
	$(if $(filter cilium,$(CNI)),hack/cilium.sh)
	$(GO) test -count=1 -v -timeout 7h ./test/cluster -nodes $(or $(NODES),3) -cni $(or $(CNI),flannel) \
		-focus '$(or $(FOCUS),\[sig-(node|network|storage)\].*\[Conformance\])' $(if $(SKIP),-exclude '$(SKIP)') \
		-procs $(or $(PROCS),4) $(if $(SHARD),-shard $(SHARD)) $(if $(RESUME),-resume)
e2e-node: engines ## Kubernetes' suite of nodes, the metrics tests; FOCUS='\[NodeConformance\]' PROCS=4 for all of it; SKIP, ENGINE=29, CRI_STATS=false, RESUME=1
	hack/kubernetes.sh e2e-node && hack/busybox.sh
	$(GO) run ./test/nodeconformance $(if $(FOCUS),-focus '$(FOCUS)') $(if $(SKIP),-skip '$(SKIP)') -procs $(or $(PROCS),1) \
		$(if $(ENGINE),-engine $(ENGINE)) $(if $(CRI_STATS),-cri-stats=$(CRI_STATS)) $(if $(RESUME),-resume)
vm: deps ## a node with cgroup v2, systemd and AppArmor in a virtual machine; STEPS='check oom@29', RESUME=1, KEEP=1; HOST=1 for this machine
	$(GO) run ./test/vm $(if $(HOST),-host) $(if $(STEPS),-steps '$(STEPS)') $(if $(RESUME),-resume) $(if $(KEEP),-keep) $(if $(DIR),-dir '$(DIR)')
bench: deps ## figures beside the floor of the same run
	$(GO) run ./test/bench
bench-stats: deps ; $(GO) run ./test/bench stats ## figures of containers beside the engine's own API
bench-heartbeat: deps ; $(GO) run ./test/bench heartbeat ## CPU of the heartbeat and of the check for missed events, daemon and engine
bench-streams: deps ; $(GO) run ./test/bench streams ## exec and port-forward beside the engine's own exec
bench-starts: deps ; $(GO) run ./test/bench starts ## create and start of containers in parallel beside the engine's own
bench-shim: engines ; $(GO) run ./test/bench shim ## pods under the containerd shim beside those of the engine's runtime, ENGINE=26.1 or 29
bench-nri: engines ; $(GO) run ./test/bench nri -rounds $(or $(ROUNDS),100) ## pods with NRI on and no plugin beside NRI off, pod by pod, and what NRI costs while it is off; ENGINE=26.1 or 29, ROUNDS (100)
bench-containerd: engines ; $(GO) run ./test/bench containerd ## pods under the containerd shim beside those of containerd's CRI, with their steps, ENGINE=26.1 or 29
bench-logs: deps ## container logs beside Docker's json-file
	$(GO) run ./test/bench logs
chaos-net: engines ; $(GO) test -count=1 -v -timeout 20h ./test/conformance -run TestChaosNet -chaos-rounds 100 -chaos-pods 50 ## kill the daemon under 50 pods, 100 times; what is left
chaos: engines ## pods under a seeded schedule of faults: SEEDS (20) runs of MINUTES (5) on both engines; FIRST_SEED, PODS, ENGINE
	$(GO) test -count=1 -v -timeout 24h ./test/chaos -run 'TestChaos$$' -parallel 1 -seeds $(or $(SEEDS),20) -first-seed $(or $(FIRST_SEED),1) \
		-minutes $(or $(MINUTES),5) -pods $(or $(PODS),8)
load: engines ; $(GO) run ./test/bench load -pods $(or $(PODS),250) ## PODS (250) pods: lists, probes, log followers, a restart
hang: engines ; $(GO) test -count=1 -v -timeout 30m ./test/conformance -run 'TestHanging|TestForwardsToAnUnacceptingPort' -strict ## the times of other objects while one hangs; a quiet machine
nri-storm: engines ## NRI plugins restart RESTARTS (20) times while CREATIONS (1000) containers are created; none lost, none twice. Both modes, CONTAINERS=shim or engine for one; ENGINE=26.1 or 29
	for mode in $(or $(CONTAINERS),shim engine); do CONTAINERS=$$mode $(GO) test -count=1 -v -timeout 60m ./test/conformance \
		-run TestNRISynchronize -nri-containers $(or $(CREATIONS),1000) -nri-restarts $(or $(RESTARTS),20) || exit 1; done
limits: engines ## 110 pods on both engines while root's pipe pages and inotify instances are used up
	$(GO) test -count=1 -v -timeout 30m ./test/packages -run TestKernelLimits -limit-pods 110
install: ## install the built programs, units, man page and completions; PREFIX (/usr/local), DESTDIR, UNITDIR
	DESTDIR="$(DESTDIR)" UNITDIR="$(UNITDIR)" ./install.sh --program $(BIN) --prefix $(PREFIX)
uninstall: ## remove the files of make install
	DESTDIR="$(DESTDIR)" UNITDIR="$(UNITDIR)" ./install.sh --uninstall --prefix $(PREFIX)
package: ## deb, rpm and tgz for amd64 and arm64 with SBOM and checksums, dist/; MAINTAINER='name <address>'
	VERSION='$(VERSION)' MAINTAINER='$(MAINTAINER)' hack/package.sh
repo: ## apt and rpm repositories with the packages of dist/, dist/repo; GPG_KEY=key, or none for no signatures
	GPG_KEY='$(GPG_KEY)' PACKAGES='$(PACKAGES)' OUT='$(OUT)' hack/repo.sh
pause: ## build the embedded pause programs from their source
	$(GO) run ./internal/engine/pause/build
lint: ## golangci-lint with .golangci.yml, and deadcode
	hack/lint.sh
style: ## measure layout and language against the limits of CONTRIBUTING.md
	$(GO) run ./hack/style
clean: ## remove what was built
	rm -rf bin dist
deps:
	hack/install-deps.sh test
engines: deps
	hack/docker29.sh && $(if $(filter 20.10 29,$(ENGINE)),,hack/docker26.sh && )hack/criu.sh && hack/kubernetes.sh kubelet && hack/cni-plugins.sh
.PHONY: help nri-storm bench-nri e2e-cluster vm install uninstall conformance-node repo chaos load hang bench-heartbeat bench-starts bench-shim bench-containerd audit limits build package demo test conformance fuzz e2e bench cluster e2e-node bench-logs bench-stats bench-streams chaos-net pause lint style clean deps engines
