# SPDX-License-Identifier: Apache-2.0
from bridge.device.fastpath.plain import AreaWords as AreaWords
from bridge.device.fastpath.plain import KcovState as KcovState
from bridge.device.fastpath.plain import ReturnHandler as ReturnHandler
from bridge.device.fastpath.plain import ReturnPoller as ReturnPoller
from bridge.device.fastpath.plain import Totals as Totals
